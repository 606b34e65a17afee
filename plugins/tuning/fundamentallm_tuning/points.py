"""What steps are like at some points of a run, and what that makes of the whole of it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from fundamentallm import Composed, Period, setting_fields
from fundamentallm_tuning.trial import SHAPING, follows, hooks

if TYPE_CHECKING:
    from fundamentallm_tuning.probe import Probe

PIECES = 200
"""Into how many pieces a run is cut where its steps change, to add them up."""
ALIKE = 1.25
"""Times of steps that differ by no more than this factor are taken for the same."""
# Who hears one of these may do another thing in a later step than in the first.
STEPPING = frozenset({"on_step_start", "settle_step", "on_step_end"})


class Point(NamedTuple):
    """A typical step at some point of a run."""

    at: float
    """The part of the run that is behind it."""
    seconds: float
    tokens: int
    samples: int
    validation: float = 0.0
    """Seconds of a validation."""

    @classmethod
    def of(cls, probe: Probe, at: float) -> Point:
        """Read it from a probe that began there; first times are no typical ones."""
        taken, validations = probe.seconds["step"], probe.validations
        return cls(
            at,
            median(taken[1:] or taken),
            probe.counts["tokens"],
            probe.counts["samples"],
            median(validations[1:] or validations or [0.0]),
        )

    def alike(self, other: Point) -> bool:
        """Tell whether steps are the same at both, but for what clocks always differ by."""
        low, high = sorted((self.seconds, other.seconds))
        return self[2:4] == other[2:4] and high <= ALIKE * low

    def amount(self, period: Period, epoch_samples: int | None) -> float:
        """Return how much of a period one step is."""
        if period.seconds is not None:
            return self.seconds / period.seconds
        if period.unit == "epochs":
            return self.samples / (period.amount * (epoch_samples or math.inf))
        return (self.tokens if period.unit == "tokens" else 1) / period.amount


class Total(NamedTuple):
    """What a run, or a part of it, comes to."""

    steps: float = 0.0
    tokens: float = 0.0
    samples: float = 0.0
    seconds: float = 0.0
    validation: float = 0.0
    """Seconds of a validation, on average."""

    def times(self, period: Period, epoch_samples: int | None) -> float:
        """Return how often a period goes into it."""
        if period.seconds is not None:
            return self.seconds / period.seconds
        if period.unit == "epochs":
            return self.samples / (period.amount * (epoch_samples or math.inf))
        return (self.tokens if period.unit == "tokens" else self.steps) / period.amount


def passed(
    length: Period, points: Sequence[Point], epoch_samples: int | None, until: float = 1.0
) -> Total:
    """Add up the steps of a run of some ``length``, or of the part ``until`` some point of it.

    Between two ``points`` all numbers are taken to change in a straight line.
    """
    pieces = PIECES if len(points) > 1 else 1
    rows = []
    for number in range(pieces):
        here = _between(points, (number + 0.5) / pieces * until)
        steps = until / pieces / here.amount(length, epoch_samples)
        rows.append(
            (
                steps,
                steps * here.tokens,
                steps * here.samples,
                steps * here.seconds,
                here.validation / pieces,
            )
        )
    return Total(*(math.fsum(column) for column in zip(*rows, strict=True)))


def may_change(composed: Composed) -> bool:
    """Tell whether a later step may be another thing than the first, as far as settings tell.

    That is so where somebody acts at every step who neither makes nor judges it, or has a period
    to do so by.
    """
    return any(
        bool(heard & STEPPING) and (not heard & {*SHAPING, "judge_step"} or _has_period(one))
        for one in composed.plugins.values()
        if not follows(one) and (heard := hooks(one))
    )


def _has_period(one: object) -> bool:
    return any(
        isinstance(value, Period)
        for name in setting_fields(type(one))
        for value in _leaves(getattr(one, name))
    )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def _between(points: Sequence[Point], at: float) -> Point:
    after = bisect_right(points, at, key=lambda point: point.at)
    if after in (0, len(points)):
        return points[min(after, len(points) - 1)]
    left, right = points[after - 1], points[after]
    part = (at - left.at) / (right.at - left.at)
    mixed: Any = [a + part * (b - a) for a, b in zip(left, right, strict=True)]
    return Point(*mixed)
