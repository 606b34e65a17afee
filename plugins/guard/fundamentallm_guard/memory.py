"""Out of memory: report memory use, release memory."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fundamentallm import Batch, Run

_MIB = 2**20


def described(run: Run, batch: Batch, error: BaseException) -> str:
    """Return where memory ran out, and a report of the memory in use."""
    return (
        f"step {run.progress.step + 1}: out of memory in a micro-batch of {batch.samples} samples "
        f"from index {batch.first}: {error or type(error).__name__}\n{report(run.device)}"
    )


def advice(oom: str) -> str:
    """Return what the user can do, given the setting ``oom``."""
    if oom == "split":
        return "nothing is left to split: make the samples shorter or the model smaller"
    return "use smaller micro-batches, or set guard.oom = 'split'"


def report(device: str) -> str:
    """Return the memory in use: torch's table on CUDA, else one line of numbers."""
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info()
        line = f"device memory: {free // _MIB} MiB free of {total // _MIB} MiB"
        return f"{line}\n{torch.cuda.memory_summary(abbreviated=True)}"
    if device == "mps":
        tensors, driver = torch.mps.current_allocated_memory(), torch.mps.driver_allocated_memory()
        return f"device memory: {tensors // _MIB} MiB in tensors, {driver // _MIB} MiB in all"
    return _of_process()


def _of_process() -> str:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // _MIB
    pages = Path("/proc/self/statm")
    if not pages.exists():
        return f"process memory: {peak} MiB at its peak"
    resident = int(pages.read_text().split()[1]) * resource.getpagesize() // _MIB
    # Linux updates the peak with a delay.
    return f"process memory: {resident} MiB resident, {max(peak, resident)} MiB at its peak"


def release(error: BaseException) -> None:
    """Release the tensors of a failed attempt, which the frames of its error still refer to."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
