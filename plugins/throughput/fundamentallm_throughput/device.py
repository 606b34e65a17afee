"""FLOPs of the model, peak FLOP/s, memory and timing events of the device."""

from __future__ import annotations

import re
import resource
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fundamentallm_throughput.clock import Marks

if TYPE_CHECKING:
    from fundamentallm import Run

PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307.4e12,
    "MI250X": 191.5e12,
}
"""FLOP/s by a part of the device's name, from the makers' data sheets: dense bfloat16 matrix
products (float16 where there is no bfloat16) that add up in float32."""


def peak_of(name: str) -> float | None:
    """Return the peak FLOP/s of the device with this name; None if it is not in the table."""
    found = (peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name))
    return next(found, None)


def peak_flops(device: str) -> float | None:
    """Return the peak FLOP/s of ``run.device``; None on a CPU, and if it is not known."""
    return peak_of(torch.cuda.get_device_name(device)) if device.startswith("cuda") else None


def flops_per_token(model: nn.Module, length: int) -> float:
    """Return the floating-point operations of training on one token in a window of ``length``.

    That is what ``model.flops_per_token(length)`` says if the model has it. Else it is
    6 per parameter that is no embedding: 2 in the forward and 4 in the backward pass, as in
    Kaplan et al., "Scaling Laws for Neural Language Models" (2020, arXiv:2001.08361), 2.1.
    """
    own = getattr(model, "flops_per_token", None)
    return float(own(length)) if callable(own) else 6.0 * matrix_parameters(model)


def matrix_parameters(model: nn.Module) -> int:
    """Count the parameters, each once, without those that only embeddings use."""
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    used = {
        id(p)
        for m in model.modules()
        if not isinstance(m, nn.Embedding)
        for p in m.parameters(recurse=False)
    }
    return sum(p.numel() for p in model.parameters() if id(p) not in looked_up - used)


def memory(run: Run) -> dict[str, float]:
    """Return the peak memory in GiB of the process and of its CUDA device."""
    # Linux counts in KiB, macOS in bytes.
    unit = 2**30 if sys.platform == "darwin" else 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"system/host_memory_gib": peak / unit}
    if run.device.startswith("cuda"):
        for name in ("allocated", "reserved"):
            used = getattr(torch.cuda, f"max_memory_{name}")(run.device)
            found[f"system/device_memory_{name}_gib"] = used / 2**30
    return found


def marks(device: str) -> Marks | None:
    """Return the moments of ``run.device``; None where those of the host are right."""
    if not device.startswith("cuda"):
        return None

    event: Any = torch.cuda.Event  # its methods are not annotated

    def take() -> Any:
        moment = event(enable_timing=True)
        moment.record(torch.cuda.current_stream(device))
        return moment

    def seconds(end: Any, start: Any) -> float:
        return float(start.elapsed_time(end)) / 1000

    return Marks(take, seconds, event.query, lambda: torch.cuda.synchronize(device))
