"""Running out of memory: how it is told from other errors, what to report, how to go on."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fundamentallm import Batch, Run

# How torch says it on a CPU and on Apple's GPUs, where the error has no type of its own.
_SAID = ("can't allocate memory", "not enough memory", "out of memory")
_MIB = 2**20


def ran_out(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _SAID)


def told(run: Run, batch: Batch, error: BaseException) -> str:
    """Say where memory ran out, and what it is used for at this moment."""
    return (
        f"step {run.progress.step + 1}: out of memory in a micro-batch of {batch.samples} samples "
        f"from index {batch.first}: {error or type(error).__name__}\n{report(run.device)}"
    )


def advice(oom: str) -> str:
    """Say what to do when the setting ``oom`` is not enough, or not set."""
    if oom == "split":
        return "nothing is left to split: make the samples shorter or the model smaller"
    return "make the micro-batches smaller, or let the guard do that: oom = 'split'"


def report(device: str) -> str:
    """Return how much memory is in use: torch's table on CUDA, else numbers in a line."""
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
    # Linux brings the peak up to date a little later.
    return f"process memory: {resident} MiB resident, {max(peak, resident)} MiB at its peak"


def let_go(error: BaseException) -> None:
    """Free what the failed attempt still holds: the frames of its error keep their tensors."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
