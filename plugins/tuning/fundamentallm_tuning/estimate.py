"""Estimate the time of a whole run from the times of some of its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fundamentallm import Composed, Period, round_up
from fundamentallm_tuning.extrapolate import StepSample, Total, total_of
from fundamentallm_tuning.trial import saves, setting
from fundamentallm_tuning.units import counted, duration, in_step, line

if TYPE_CHECKING:
    from fundamentallm_tuning.probe import Probe


class Plan(NamedTuple):
    """The length and the periods of the run as the settings state them."""

    length: Period
    validates: Period | None
    validates_first: bool
    saves: list[Period]

    @classmethod
    def of(cls, composed: Composed) -> Plan:
        """Read it from the settings, before a trial changes them."""
        run = composed.run
        savers = [one for one in composed.plugins.values() if saves(one)]
        periods = [setting(one, "every", Period) for one in savers]
        found = [every for every in periods if every is not None]
        return cls(run.length, run.validate_every, run.validate_first, found)


class FirstTimes(NamedTuple):
    """Extra seconds of the first step and the first validation, such as those for compiling."""

    step: float
    validation: float

    @classmethod
    def of(cls, probe: Probe, sample: StepSample) -> FirstTimes:
        """Compare the first times in the probe of a run's start with a typical step there."""
        first = max([*probe.validations[:1], sample.validation])
        return cls(max(probe.seconds["step"][0] - sample.seconds, 0.0), first - sample.validation)


def estimated(plan: Plan, probe: Probe, samples: Sequence[StepSample]) -> Iterator[str]:
    """Yield the lines on speed and on the time of the whole run.

    ``probe`` and the first of the ``samples`` are from the start of the run.
    """
    start, taken = samples[0], probe.seconds["step"]
    first = f"; the first {duration(taken[0])}" if taken[1:] else ""
    rate = f"{start.tokens / start.seconds:,.0f} tokens/s"
    yield line("speed", f"{duration(start.seconds)} for a step{first}; {rate}")
    for sample in samples[1:]:
        where = "at the end" if sample.at == 1 else f"after {sample.at:.0%}"
        rate = f"{sample.tokens / sample.seconds:,.0f} tokens/s"
        size = f"{in_step(sample.samples, sample.tokens)}; {rate}"
        yield line("", f"{where} {duration(sample.seconds)} for a step of {size}")
    yield line("run", _whole_run(plan, probe, samples))


def _whole_run(plan: Plan, probe: Probe, samples: Sequence[StepSample]) -> str:
    once, epoch = FirstTimes.of(probe, samples[0]), probe.epoch_samples
    total = _total(plan.length, samples, epoch, once.step)
    steps = max(round_up(total.steps), 1)
    tokens = counted(steps * total.tokens / total.steps, "token")
    seconds = steps * total.seconds / total.steps + once.step
    first = _first(probe.seconds["step"], once.step)
    parts = [f"{counted(steps, 'step')} of {_range(samples)}{first}"]
    if probe.metrics:
        due = 1 if plan.validates is None else round_up(total.times(plan.validates, epoch))
        count = due + plan.validates_first
        seconds += count * total.validation + once.validation
        parts.append(
            f"{counted(count, 'validation')} of {duration(total.validation)}"
            f"{_first(probe.validations, once.validation)}"
        )
    save = max(probe.seconds["on_safe_point"], default=0.0) if plan.saves else 0.0
    if save:
        count = sum(round_up(total.times(every, epoch)) for every in plan.saves)
        seconds += count * save
        parts.append(f"{counted(count, 'save')} of {duration(save)} at most")
    return f"about {duration(seconds)} for {tokens}: {', '.join(parts)}"


def _total(length: Period, samples: Sequence[StepSample], epoch: int | None, once: float) -> Total:
    # Of a run whose length is a time, the first step takes a part; there is at least one step.
    part = 1 - once / length.seconds if length.seconds is not None else 1.0
    least = min(samples[0].amount(length, epoch), 1.0)
    return total_of(length, samples, epoch, max(part, least))


def _range(samples: Sequence[StepSample]) -> str:
    low, high = (duration(kind(sample.seconds for sample in samples)) for kind in (min, max))
    return low if low == high else f"{low} to {high}"


def _first(taken: Sequence[float], once: float) -> str:
    """Return the first time, if it is much longer than the later ones."""
    return f" (the first {duration(taken[0])})" if once > 0.5 * taken[0] else ""
