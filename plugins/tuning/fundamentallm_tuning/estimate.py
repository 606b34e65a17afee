"""How long a whole run will take, from what some steps of it took."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from fundamentallm import Composed, Period
from fundamentallm_tuning.findings import in_step, line
from fundamentallm_tuning.points import Point, Total, passed
from fundamentallm_tuning.trial import answers
from fundamentallm_tuning.units import counted, duration

if TYPE_CHECKING:
    from fundamentallm_tuning.probe import Probe


class Plan(NamedTuple):
    """What the settings say of the run's length and rhythms, before a trial changes them."""

    length: Period
    validates: Period | None
    validates_first: bool
    saves: list[Period]

    @classmethod
    def of(cls, composed: Composed) -> Plan:
        """Read it from the settings."""
        run = composed.run
        savers = [one for one in composed.plugins.values() if answers(one, "read_checkpoint")]
        rhythms = [getattr(one, "every", None) for one in savers]
        saves = [every for every in rhythms if isinstance(every, Period)]
        return cls(run.length, run.validate_every, run.validate_first, saves)


class Once(NamedTuple):
    """What a first time takes on top of what a later one does: compiling, say."""

    step: float
    validation: float

    @classmethod
    def of(cls, probe: Probe, point: Point) -> Once:
        """Return it for the probe of a run's start, where a step is typically like ``point``."""
        first = max([*probe.validations[:1], point.validation])
        return cls(max(probe.seconds["step"][0] - point.seconds, 0.0), first - point.validation)


def estimated(plan: Plan, probe: Probe, points: Sequence[Point]) -> Iterator[str]:
    """Tell the speed, and what the whole run will take: ``probe`` is that of its start, where the
    first of the ``points`` is too."""
    start, taken = points[0], probe.seconds["step"]
    first = f"; the first {duration(taken[0])}" if taken[1:] else ""
    rate = f"{start.tokens / start.seconds:,.0f} tokens/s"
    yield line("speed", f"{duration(start.seconds)} for a step{first}; {rate}")
    for point in points[1:]:
        where = "at the end" if point.at == 1 else f"after {point.at:.0%}"
        rate = f"{point.tokens / point.seconds:,.0f} tokens/s"
        size = f"{in_step(point.samples, point.tokens)}; {rate}"
        yield line("", f"{where} {duration(point.seconds)} for a step of {size}")
    yield line("run", _whole_run(plan, probe, points))


def _whole_run(plan: Plan, probe: Probe, points: Sequence[Point]) -> str:
    once, epoch = Once.of(probe, points[0]), probe.epoch_samples
    total = _total(plan.length, points, epoch, once.step)
    steps = max(_whole(total.steps), 1)
    tokens = counted(steps * total.tokens / total.steps, "token")
    seconds = steps * total.seconds / total.steps + once.step
    first = _first(probe.seconds["step"], once.step)
    parts = [f"{counted(steps, 'step')} of {_range(points)}{first}"]
    if probe.metrics:
        due = 1 if plan.validates is None else _whole(total.times(plan.validates, epoch))
        count = due + plan.validates_first
        seconds += count * total.validation + once.validation
        parts.append(
            f"{counted(count, 'validation')} of {duration(total.validation)}"
            f"{_first(probe.validations, once.validation)}"
        )
    save = max(probe.seconds["on_safe_point"], default=0.0) if plan.saves else 0.0
    if save:
        count = sum(_whole(total.times(every, epoch)) for every in plan.saves)
        seconds += count * save
        parts.append(f"{counted(count, 'save')} of {duration(save)} at most")
    return f"about {duration(seconds)} for {tokens}: {', '.join(parts)}"


def _total(length: Period, points: Sequence[Point], epoch: int | None, once: float) -> Total:
    # Of a run that lasts some time, the first step takes its part; there is one in any case.
    part = 1 - once / length.seconds if length.seconds is not None else 1.0
    least = min(points[0].amount(length, epoch), 1.0)
    return passed(length, points, epoch, max(part, least))


def _range(points: Sequence[Point]) -> str:
    low, high = (duration(kind(point.seconds for point in points)) for kind in (min, max))
    return low if low == high else f"{low} to {high}"


def _first(taken: Sequence[float], once: float) -> str:
    """Tell of the first time, where it stands out."""
    return f" (the first {duration(taken[0])})" if once > 0.5 * taken[0] else ""


def _whole(count: float) -> int:
    """Round up; but what is 3.0000000000000004 in binary is 3."""
    return math.ceil(count * (1 - 1e-9))
