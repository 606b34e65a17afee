"""The stopwatch of one process of a run: which calls are timed in which step, and what follows."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from fundamentallm_throughput.clock import BETWEEN, PHASE_OF, Clock

if TYPE_CHECKING:
    from collections.abc import Container

    from fundamentallm import Run
    from fundamentallm_throughput.clock import Call


class Watch:
    """Times what lies between the steps always, and the inside of one step in ``every``.

    The second of each ``every`` steps is the one: the first of a run, in which much is made ready,
    would speak for none of the others.
    """

    def __init__(self, run: Run, name: str, every: int) -> None:
        self.clock = Clock()
        self.began = self.clock.now()
        self.sampled_steps = 0
        self.sampled_seconds = self._earlier = 0.0
        self.started = False
        self._ends: list[float] = [0.0]
        self._before = run.hook
        self._name, self._every, self._turn = name, every, 1 % every
        self._plain = run.bind(partial(self._around, BETWEEN))
        self._sampling = run.bind(partial(self._around, frozenset(PHASE_OF.values())))
        run.hook = self._plain

    def start(self, run: Run) -> None:
        """Begin with the steps, and with the first log period."""
        self.started = True
        self.first_step, self.first_tokens = run.progress.step, run.progress.tokens
        self._take_turn(run)
        self._begin_period(run)

    def step_ended(self, run: Run) -> None:
        """Note how long the step took, and choose whether the next is timed inside."""
        # Not the run's own seconds: they go on while it validates and saves.
        end = self.clock.now() - self.clock.between
        self._ends.append(end)
        if run.hook is self._sampling:
            self.sampled_steps += 1
            self.sampled_seconds += end - self._ends[-2]
            run.hook = self._plain
        if run.progress.step % self._every == self._turn:
            self._take_turn(run)

    @property
    def step_seconds(self) -> float:
        """What the steps have taken so far, all together."""
        return self._earlier + self._ends[-1] - self._ends[0]

    def stop(self, run: Run) -> None:
        """Time nothing any more."""
        if run.hook is self._plain or run.hook is self._sampling:
            run.hook = self._before

    def period(self, run: Run) -> dict[str, float]:
        """Return the rates and step times since the last call; empty if there was no step."""
        progress, steps = run.progress, len(self._ends) - 1
        seconds = self.clock.in_steps() - self._ends[0]
        tokens, samples = progress.tokens - self._tokens, progress.samples - self._samples
        each = sorted(b - a for a, b in pairwise(self._ends))
        if not steps or seconds <= 0:
            return {}
        self._begin_period(run)
        return {
            "perf/tokens_per_second": tokens / seconds,
            "perf/samples_per_second": samples / seconds,
            "perf/step_ms": 1000 * seconds / steps,
            "perf/step_ms_median": 1000 * quantile(each, 0.5),
            "perf/step_ms_p99": 1000 * quantile(each, 0.99),
        }

    def _begin_period(self, run: Run) -> None:
        self._earlier = self.step_seconds
        self._tokens, self._samples = run.progress.tokens, run.progress.samples
        self._ends = [self.clock.in_steps()]

    def _take_turn(self, run: Run) -> None:
        # The loop takes the hooks anew at the start of a step: these are for the next. Hooks that
        # somebody else has put there, who traces some steps, stay.
        if run.progress.step % self._every == self._turn and run.hook is self._plain:
            run.hook = self._sampling

    def _around(self, phases: Container[str], plugin: str, hook: str, call: Call) -> Call:
        if plugin == self._name:
            # The one call that every step makes. It cannot fail: it needs nobody who catches.
            return self.step_ended if hook == "on_step_end" else call
        timed = PHASE_OF.get(hook, "") in phases
        return self.clock.timed(plugin, hook, call) if timed else call


def quantile(ordered: list[float], q: float) -> float:
    """Return the smallest of some sorted values that at least the share ``q`` of them reaches."""
    return ordered[max(math.ceil(q * len(ordered)), 1) - 1]
