"""What tests on a GPU need of it, with a stand-in where the same test runs on the CPU."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import string
import warnings
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from fundamentallm.testing import HostReads

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
"""To run a test on both, where there are both."""

SIZE = 8192
WAITED = "called a synchronizing CUDA operation"


def corpus(folder: Path, size: int = 20_000) -> dict[str, Any]:
    """Write a text of 27 different characters, and return the settings of ``text`` that read it."""
    path, source = folder / "corpus.txt", random.Random(7)
    words = ["".join(source.choices(string.ascii_lowercase, k=5)) for _ in range(40)]
    text = " ".join([string.ascii_lowercase, *source.choices(words, k=size // 6)])
    path.write_text(text)
    return {
        "path": str(path),
        "tokenizer": "char",
        "validation_batches": 2,
        "cache_dir": str(folder / "cache"),
    }


def synchronize(device: str) -> None:
    """Wait until the device has finished its queue."""
    if device == "cuda":
        torch.cuda.synchronize()


@functools.cache
def _product() -> tuple[Any, Any, float]:
    """Return a matrix, room for its square, and the seconds that squaring it takes the GPU."""
    matrix = torch.randn(SIZE, SIZE, device="cuda")
    room = torch.empty_like(matrix)
    torch.mm(matrix, matrix, out=room)  # the first product loads the library
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    torch.mm(matrix, matrix, out=room)
    ended.record()
    torch.cuda.synchronize()
    return matrix, room, began.elapsed_time(ended) / 1000


def occupy(device: str, seconds: float) -> None:
    """Queue work that keeps a GPU busy for at least these seconds; a CPU has no queue."""
    if device == "cuda":
        matrix, room, each = _product()
        for _ in range(math.ceil(seconds / each)):
            torch.mm(matrix, matrix, out=room)


def prepare_to_occupy(device: str) -> None:
    """Do now what the first ``occupy`` would wait for."""
    if device == "cuda":
        _product()


def forget_memory() -> None:
    """Give cached memory of the GPU back, and measure its peak from now on."""
    import gc

    _product.cache_clear()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


class Waits:
    """Counts the times that the host waits for the device, between ``start`` and ``stop``.

    On a GPU by what PyTorch reports itself, with ``strict`` as an error in place of a report; on a
    CPU by the reads that would wait for a GPU.
    """

    def __init__(self, device: str, *, strict: bool = False) -> None:
        self.device, self.strict = device, strict
        self.reads = HostReads()
        self._warned: list[warnings.WarningMessage] = []
        self._open = contextlib.ExitStack()

    def start(self) -> None:
        self._open.enter_context(self.reads)
        if self.device == "cuda":
            self._warned = self._open.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            self._open.callback(torch.cuda.set_sync_debug_mode, "default")
            torch.cuda.set_sync_debug_mode("error" if self.strict else "warn")

    def stop(self) -> None:
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def places(self) -> list[str]:
        """The line of Python that waited, of each time."""
        if self.device != "cuda":
            return [*self.reads.found.elements()]
        return [f"{w.filename}:{w.lineno}" for w in self._warned if WAITED in str(w.message)]
