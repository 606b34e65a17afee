"""Find the process that slows a run of several processes down."""

from __future__ import annotations

import logging
from statistics import median, median_low
from typing import TYPE_CHECKING

from fundamentallm import answering

if TYPE_CHECKING:
    from fundamentallm import Run
    from fundamentallm_throughput.sampled_steps import Samples

OF_PROCESS = "perf/own_ms_of_process_"
OWN = ("data", "forward")
"""The phases in which a process waits for no other."""
ROWS = 3
"""Rows in which the same process is too slow before there is a warning."""
MATTERS = 0.1
"""Smallest part of a step's time that a slow process costs all, for a warning."""

log = logging.getLogger("fundamentallm")


class SlowProcess:
    """Compares the time that each process spends on its own in a step.

    All processes wait for the slowest one, so their steps take equally long. What differs is the
    time of reading data and of forward passes. Each process logs its own under a name of its own:
    so it travels with the next row of metrics. An observer must not send a message that the others
    wait for, since it may be muted in one process.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._seen: tuple[int, int] = (-1, 0)  # a process, and the rows in which it was too slow

    def log_own(self, run: Run, samples: Samples) -> None:
        """Log the median of this process over the last steps that were timed."""
        joiner = answering(run.plugins, "agree")
        own = [
            sum(s for (phase, plugin), s in parts.items() if phase in OWN and plugin != joiner)
            for parts in samples.recent
        ]
        if own and run.world_size > 1:
            run.log(f"{OF_PROCESS}{run.rank}", 1000 * median(own), weight=1.0)

    def compared(self, run: Run, metrics: dict[str, float]) -> dict[str, float]:
        """Return the metrics with the slowest process in place of all of them; warn of it."""
        given = {
            int(name.removeprefix(OF_PROCESS)): value
            for name, value in metrics.items()
            if name.startswith(OF_PROCESS)
        }
        others = {n: value for n, value in metrics.items() if not n.startswith(OF_PROCESS)}
        if len(given) < 2:
            return others
        slowest = max(given, key=given.__getitem__)
        usual = median_low(given.values())
        self._watch(run, slowest, given[slowest], usual, others.get("perf/step_ms", 0.0))
        return others | {
            "perf/slowest_process": float(slowest),
            "perf/slowest_process_own_ms": given[slowest],
            "perf/median_process_own_ms": usual,
        }

    def _watch(self, run: Run, slowest: int, its: float, usual: float, step: float) -> None:
        known, rows = self._seen
        if its <= self._factor * usual or its - usual < MATTERS * step:
            self._seen = (-1, 0)
            return
        self._seen = (slowest, rows + 1 if slowest == known else 1)
        if self._seen[1] == ROWS and run.rank == 0:
            log.warning(
                "process %d slows the others down: for data and forward passes, it takes %.3g ms "
                "of a step, and the median process %.3g ms",
                slowest,
                its,
                usual,
            )
