"""How long a whole run will take, from what a few steps of it took."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from fundamentallm import Composed, Period
from fundamentallm_tuning.findings import line
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


class Speed(NamedTuple):
    """What a step is made of, to turn periods into steps."""

    seconds: float
    tokens: int
    samples: int
    epoch_samples: int | None

    def steps_in(self, period: Period) -> float:
        """Return how many steps a period has, if all are like this one."""
        if period.seconds is not None:
            return period.seconds / self.seconds
        if period.unit == "epochs":
            return period.amount * (self.epoch_samples or 0) / self.samples
        return period.amount / (self.tokens if period.unit == "tokens" else 1)


def estimated(plan: Plan, probe: Probe) -> Iterator[str]:
    """Tell the speed, and what the whole run will take."""
    taken = probe.seconds["step"]
    typical = median(taken[1:] or taken)
    counts = probe.counts
    speed = Speed(typical, counts["tokens"], counts["samples"], probe.epoch_samples)
    first = f"; the first {duration(taken[0])}" if taken[1:] else ""
    rate = counts["tokens"] / typical
    yield line("speed", f"{duration(typical)} for a step{first}; {rate:,.0f} tokens/s")
    length = speed.steps_in(plan.length)
    steps = _whole(length)
    validation = max(probe.seconds["validate"], default=0.0) if probe.metrics else 0.0
    validations = _times(plan.validates, length, speed) + plan.validates_first
    save = max(probe.seconds["on_safe_point"], default=0.0) if plan.saves else 0.0
    saves = sum(_times(every, length, speed) for every in plan.saves)
    tokens = counted(steps * counts["tokens"], "token")
    parts = [f"{counted(steps, 'step')} of {duration(typical)}"]
    if validation:
        parts.append(f"{counted(validations, 'validation')} of {duration(validation)}")
    if save:
        parts.append(f"{counted(saves, 'save')} of {duration(save)} at most")
    total = steps * typical + validations * validation + saves * save
    yield line("run", f"about {duration(total)} for {tokens}: {', '.join(parts)}")


def _times(every: Period | None, length: float, speed: Speed) -> int:
    """Return how often something is done: when it is due, and at the end."""
    return 1 if every is None else _whole(length / speed.steps_in(every))


def _whole(count: float) -> int:
    """Round up; but what is 3.0000000000000004 in binary is 3."""
    return math.ceil(count * (1 - 1e-12))
