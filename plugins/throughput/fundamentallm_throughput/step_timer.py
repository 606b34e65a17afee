"""Time the steps of one process: all of them as a whole, some hook by hook."""

from __future__ import annotations

import math
from functools import partial
from operator import sub
from random import Random
from typing import TYPE_CHECKING, Any

from fundamentallm_throughput.clock import BETWEEN, PHASE_OF
from fundamentallm_throughput.sampled_steps import Samples, turns

if TYPE_CHECKING:
    from fundamentallm import Run
    from fundamentallm_throughput.clock import Call, Clock


class StepTimer:
    """Times all calls between steps, and the hooks of the first step and of some others.

    The first step initializes much, and represents no other. Steps are counted from the start of
    the process: one that is repeated after a rewind counts again.
    """

    def __init__(self, run: Run, name: str, every: int, clock: Clock) -> None:
        self.clock = clock
        self.began = clock.now()
        self.samples = Samples(clock.marks)
        self.started = False
        self.steps = 0
        self._ends: list[float] = [0.0]
        self._before = run.hook
        self._name = name
        # A generator of its own: an observer must not change the run's random state.
        self._turns = turns(every, Random(run.seed_for("throughput")))  # noqa: S311
        self._chosen, self._weight = 1, 0
        self._open: int | None = None
        self._start: Any = None
        self._plain = run.bind(partial(self._around, in_step=False))
        self._sampling = run.bind(partial(self._around, in_step=True))
        run.hook = self._plain

    def start(self, run: Run) -> None:
        """Begin the steps and the first log period."""
        self.started = True
        self.first_step, self.first_tokens = run.progress.step, run.progress.tokens
        self._begun = self._first_end = self.clock.in_steps()
        self._begin_period(run)
        self._start, self._open = self.clock.marks.take(), 0
        if run.hook is self._plain:
            run.hook = self._sampling

    def step_ended(self, run: Run) -> None:
        """Record the time of the step; choose whether the next is timed hook by hook."""
        # Not the seconds of the run: they include validation and saves.
        end = self.clock.now() - self.clock.between
        self._ends.append(end)
        self.steps += 1
        if self.steps == 1:
            self._first_end = end
        # The loop reads run.hook at the start of a step, so this is for the next one. Hooks that
        # another plugin has set, to trace some steps, stay.
        if self.steps + 1 >= self._chosen and run.hook is self._plain:
            run.hook = self._sampling

    @property
    def first_seconds(self) -> float:
        """Seconds of the first step; 0 if there was none."""
        return self._first_end - self._begun

    @property
    def step_seconds(self) -> float:
        """Total seconds of the other steps so far."""
        return max(self._ends[-1] - self._first_end, 0.0)

    def stop(self, run: Run) -> None:
        """Remove the timers."""
        if run.hook is self._plain or run.hook is self._sampling:
            run.hook = self._before
        self.samples.settle()

    def period(self, run: Run) -> dict[str, float]:
        """Return the rates and step times since the last call; empty if there was no step."""
        self.samples.settle()
        progress, steps = run.progress, len(self._ends) - 1
        seconds = self.clock.in_steps() - self._ends[0]
        tokens, samples = progress.tokens - self._tokens, progress.samples - self._samples
        each = sorted(map(sub, self._ends[1:], self._ends))
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
        self._tokens, self._samples = run.progress.tokens, run.progress.samples
        self._ends = [self.clock.in_steps()]

    def _around(self, plugin: str, hook: str, call: Call, *, in_step: bool) -> Call:
        if plugin == self._name:
            # Called in every step without protection, because it cannot fail.
            return self.step_ended if hook == "on_step_end" else call
        if hook == "stop_agreed" and plugin and in_step:
            return self._bounded(call)
        phase = PHASE_OF.get(hook)
        if phase is None or not (in_step or phase in BETWEEN):
            return call
        timed = self.clock.timed(plugin, hook, call, in_step=in_step)
        return self._caught_up(timed) if hook == "validate" else timed

    def _caught_up(self, call: Call) -> Call:
        def caught_up(**given: Any) -> Any:
            # Work that steps have queued does not belong to the validation. Inside of its wrappers
            # the device may work for the validation itself.
            if not self.clock.in_call:
                self.clock.marks.wait()
            return call(**given)

        return caught_up

    def _bounded(self, call: Call) -> Call:
        """Return ``stop_agreed`` as the end of a timed step and the begin of the next: the loop
        calls it after each step, behind all plugins."""

        def bounded(run: Run, **given: Any) -> Any:
            answer = call(run=run, **given)
            clock, mark = self.clock, self.clock.marks.take()
            parts, clock.parts = clock.parts, []
            # Only if exactly one step ended: not after a rewind or with other hooks.
            if self._open == self.steps - 1:
                self.samples.pending.append((self._weight, self._start, mark, parts))
                if self.steps == 1:
                    self._first_end = clock.now() - clock.between
            while self._chosen <= self.steps:
                self._chosen, self._weight = next(self._turns)
            if self._chosen == self.steps + 1:
                self._start, self._open = mark, self.steps
            else:
                self._open = None
                run.hook = self._plain if run.hook is self._sampling else run.hook
            return answer

        return bounded


def quantile(ordered: list[float], q: float) -> float:
    """Return the smallest of sorted values that at least the fraction ``q`` does not exceed."""
    return ordered[max(math.ceil(q * len(ordered)), 1) - 1]
