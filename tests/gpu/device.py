"""The device of the benchmark: a CUDA GPU, or a stand-in on the CPU that has the same methods.

All calls of ``torch.cuda`` in the benchmark are in this module. The stand-in makes it possible to
execute every other line on a machine without a GPU. What it returns is real where a CPU has such a
thing (times, traces), and 0 where it has not (reads of device values).
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import platform
import resource
import time
import warnings
from collections import defaultdict
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Cuda:
    """The current CUDA device; ``mode`` is that of the compiler."""

    def __init__(self, mode: str = "default") -> None:
        self.mode: str | None = None if mode == "default" else mode

    @property
    def compiler(self) -> dict[str, str]:
        """The table of the plugin compile."""
        return {"backend": self.backend, "mode": self.mode or "default"}

    kind = "cuda"
    backend = "inductor"
    graphs: ClassVar[dict[str, str]] = {"mode": "reduce-overhead"}
    """The settings with which the compiler records CUDA graphs."""
    activity = ProfilerActivity.CUDA
    busy = ("kernel", "gpu_memcpy", "gpu_memset")
    """The categories of a trace that are work of the device."""

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def mark(self) -> Any:
        """Return the moment at which the device has done all that is queued now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Return the time between two moments; both must have passed."""
        return start.elapsed_time(end) / 1000

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory()

    def copied(self) -> Any:
        """Return an event that has happened when the copies queued so far are done."""
        event = torch.cuda.Event()
        event.record()
        return event

    def allocated(self) -> int:
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    def free(self) -> None:
        """Return unused memory, so that the next measurement starts like the first."""
        gc.collect()
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def host_reads(self) -> Iterator[list[str]]:
        """Collect the operations for which the host waits for a value of the device."""
        found: list[str] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode("default")
        # The mode itself also warns, that it is a prototype.
        texts = [f"{w.filename}:{w.lineno}: {w.message}" for w in caught]
        found += [text for text in texts if "called a synchronizing" in text]


class Moment:
    """A moment of the host, in place of a CUDA event."""

    def __init__(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """Return at once: on a CPU all that was called is done."""


class Cpu:
    """The CPU in place of a GPU."""

    kind = "cpu"
    mode = None
    compiler: ClassVar[dict[str, str]] = {"backend": "aot_eager"}
    backend = "aot_eager"  # generates no code, so that a dry execution takes seconds
    graphs: ClassVar[dict[str, str]] = {}
    activity = ProfilerActivity.CPU
    busy = ("cpu_op",)
    name = platform.processor() or platform.machine()

    def synchronize(self) -> None:
        """Do nothing: on a CPU all that was called is done."""

    def mark(self) -> Moment:
        return Moment()

    def seconds(self, start: Moment, end: Moment) -> float:
        return end.time - start.time

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    copied = mark

    def allocated(self) -> int:
        return 0

    def reset_peak(self) -> None:
        """Do nothing: the peak of a process cannot be reset."""

    def peak(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def free(self) -> None:
        gc.collect()

    @contextlib.contextmanager
    def host_reads(self) -> Iterator[list[str]]:
        """Collect nothing: a CPU's values need no wait. ``HostReads`` counts the reads there."""
        yield []


Device = Cuda | Cpu


def work_in(trace: Path, busy: tuple[str, ...]) -> list[tuple[float, float, str]]:
    """Return the work of the device in a trace: begin and end in microseconds, and its name."""
    events = json.loads(trace.read_text())["traceEvents"]
    return sorted(
        (float(event["ts"]), float(event["ts"]) + float(event["dur"]), event["name"])
        for event in events
        if event.get("ph") == "X" and event.get("cat") in busy
    )


def idle_share(work: list[tuple[float, float, str]]) -> float:
    """Return the part of the time, from the first to the last work, in which there is none.

    Work of several streams may overlap, so the union of the intervals counts. Without any work it
    is NaN, which meets no goal.
    """
    if not work:
        return math.nan
    first, covered = work[0][0], 0.0
    end = first
    for start, stop, _ in work:
        covered += max(stop - max(start, end), 0.0)
        end = max(end, stop)
    return 1 - covered / (end - first)


def longest(work: list[tuple[float, float, str]]) -> dict[str, dict[str, float]]:
    """Return count and milliseconds of the forty names that take longest, to see what to improve."""
    total: defaultdict[str, list[float]] = defaultdict(list)
    for start, stop, name in work:
        total[name].append((stop - start) / 1000)
    found = sorted(total.items(), key=lambda item: -sum(item[1]))
    return {name: {"count": len(all_), "ms": sum(all_)} for name, all_ in found[:40]}


class Recording:
    """Records what the device does from ``start`` to ``stop``.

    Then ``share`` is its idle part, and ``work`` what took longest.
    """

    def __init__(self, device: Device, trace: Path) -> None:
        self.device, self.trace = device, trace
        self.share = math.nan
        self.work: dict[str, dict[str, float]] = {}

    def start(self) -> None:
        self.recording = profile(activities=[self.device.activity])
        self.device.synchronize()
        self.recording.start()

    def stop(self) -> None:
        self.device.synchronize()
        self.recording.stop()
        self.recording.export_chrome_trace(str(self.trace))
        work = work_in(self.trace, self.device.busy)
        self.share, self.work = idle_share(work), longest(work)
        self.trace.unlink()
