"""The threads that torch computes with on the CPU, and what they do while they wait.

torch's OpenMP library (libgomp) lets a thread that waits for the others spin. Where every thread
has a core, that is the fastest way to wait: without it a small model trains a fifth slower. Where
another process uses one of these cores, the spinning threads take the time of the one that they
wait for, and a step may take twenty times as long. No fixed setting is right for both.

libgomp spins much less while a process has more OpenMP threads than cores (its manual says so of
``GOMP_SPINCOUNT``). So ``sharing_cores`` looks twice a second how many cores other processes use,
and while they use some that torch's threads need, further threads exist that do nothing. Results do
not depend on it. They may depend on the number of threads: that is never chosen by the load.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from fundamentallm.folder import environment

if TYPE_CHECKING:
    from fundamentallm.run import Run

EVERY = 0.5  # seconds between two looks
# Missing cores above which the threads begin to spin less, and below which they spin again. The
# bounds differ, so that a load near one of them does not switch at every look.
CROWDED, FREE = 0.25, 0.15
CHOICES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
log = logging.getLogger("fundamentallm")


@contextlib.contextmanager
def computing_threads(run: Run) -> Iterator[None]:
    """Let torch compute with ``run.threads`` threads, or with as many as the run had before, since
    results may depend on the number; else with as many as torch or the environment chooses."""
    import torch

    before, chosen = torch.get_num_threads(), run.settings.threads
    recorded = environment(run.folder).get("threads")
    kept = recorded if isinstance(recorded, int) and recorded > 0 else before
    if not chosen and kept != before:
        text = "torch computes with %d threads, as before; run.threads can choose another number"
        log.info(text, kept)
    torch.set_num_threads(chosen or kept)
    try:
        yield
    finally:
        # A program may compute something else with torch afterwards, or train another run.
        torch.set_num_threads(before)


@attrs.frozen
class CpuTimes:
    """What the cores that this process may use have done so far, in seconds."""

    time: float
    busy: float
    """Time that they were used, by all processes."""
    own: float
    """Time that this process has used."""

    @classmethod
    def take(cls) -> CpuTimes | None:
        """Read the counts of the system; None where there are none, as on macOS."""
        try:
            cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
            lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
            # User, nice and system time, and what a virtual machine's host gave to others.
            busy = sum(sum(map(int, (*w[1:4], *w[8:9]))) for w in lines if w and w[0] in cores)
            ticks = os.sysconf("SC_CLK_TCK")
        except (AttributeError, OSError, ValueError):
            return None
        # The last one is that of all threads of this process; its child processes count as others.
        return cls(time.monotonic(), busy / ticks, time.process_time())

    def used_by_others(self, earlier: CpuTimes) -> float:
        """Return how many cores other processes have used since an earlier reading."""
        passed = self.time - earlier.time
        busy, own = self.busy - earlier.busy, self.own - earlier.own
        return max(0.0, busy - own) / passed if passed > 0 else 0.0


@contextlib.contextmanager
def sharing_cores() -> Iterator[None]:
    """Let torch's threads spin less while other processes need the cores, and say so once.

    Does nothing where the environment has chosen (``GOMP_SPINCOUNT``, ``OMP_WAIT_POLICY``), and on
    systems that do not count what their cores do.
    """
    first = CpuTimes.take()
    if first is None or any(name in os.environ for name in CHOICES):
        yield
        return
    over = threading.Event()
    watching = threading.Thread(target=_watch, args=(first, over), name="cores", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def _watch(earlier: CpuTimes, over: threading.Event) -> None:
    idle, cores, warned = Idle(), len(os.sched_getaffinity(0)), False
    while not over.wait(EVERY):
        now, count = CpuTimes.take(), getattr(sys.modules.get("torch"), "get_num_threads", None)
        if now is None or count is None:  # torch is still being imported
            continue
        others, threads = now.used_by_others(earlier), count()
        earlier, missing = now, threads - (cores - others)
        if missing > CROWDED and threads > 1 and not idle.count:
            idle.start(threads, cores)
            if not warned:
                warned = True
                log.warning(
                    "other processes use %.1f of %d cores: steps take longer, and torch's threads"
                    " spin less while they wait; fewer threads may be faster: --set run.threads=%d",
                    others,
                    cores,
                    max(1, round(cores - others)),
                )
        elif missing < FREE and idle.count:
            idle.end()
    idle.end()


class Idle:
    """OpenMP threads that do nothing but exist; see above."""

    def __init__(self) -> None:
        self.count = 0
        self._over = threading.Event()
        self._all: list[threading.Thread] = []

    def start(self, threads: int, cores: int) -> None:
        """Start enough of them that there are more threads than cores."""
        # Each of them gets a team of ``threads`` OpenMP threads, as the main thread has one.
        self.count, self._over = cores // threads, threading.Event()
        for _ in range(self.count):
            one = threading.Thread(target=self._exist, args=(self._over,), daemon=True)
            one.start()
            self._all.append(one)

    def end(self) -> None:
        """End them, and wait until they have ended: a library must not be unloaded before."""
        self._over.set()
        while self._all:
            self._all.pop().join()
        self.count = 0

    @staticmethod
    def _exist(over: threading.Event) -> None:
        import torch

        torch.ones(1 << 20).add_(1)  # large enough to be shared out: now it has threads of its own
        over.wait()
