"""Extrapolate the totals of a run from steps sampled at several points of it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from fundamentallm import Composed, Period, role_of, setting_fields
from fundamentallm_tuning.trial import SHAPING_ROLES, follows, hooks

if TYPE_CHECKING:
    from fundamentallm_tuning.probe import Probe

PIECES = 200
"""Number of pieces of a run whose steps change, for the sum over all steps."""
ALIKE = 1.25
"""Largest factor between two step times that count as equal."""
# A plugin with one of these hooks may do other work in a later step than in the first.
STEPPING = frozenset({"on_step_start", "settle_step", "on_step_end"})


class StepSample(NamedTuple):
    """A typical step at some point of a run."""

    at: float
    """Fraction of the run before it."""
    seconds: float
    tokens: int
    samples: int
    validation: float = 0.0
    """Seconds of a validation."""

    @classmethod
    def of(cls, probe: Probe, at: float) -> StepSample:
        """Make it from a probe that began there; the first step and validation are left out."""
        taken, validations = probe.seconds["step"], probe.validations
        return cls(
            at,
            median(taken[1:] or taken),
            probe.counts["tokens"],
            probe.counts["samples"],
            median(validations[1:] or validations or [0.0]),
        )

    def alike(self, other: StepSample) -> bool:
        """Return whether both steps have the same size and about the same time."""
        low, high = sorted((self.seconds, other.seconds))
        return self[2:4] == other[2:4] and high <= ALIKE * low

    def amount(self, period: Period, epoch_samples: int | None) -> float:
        """Return which fraction of a period one step is."""
        if period.seconds is not None:
            return self.seconds / period.seconds
        if period.unit == "epochs":
            return self.samples / (period.amount * (epoch_samples or math.inf))
        return (self.tokens if period.unit == "tokens" else 1) / period.amount


class Total(NamedTuple):
    """Totals of a run, or of a part of it."""

    steps: float = 0.0
    tokens: float = 0.0
    samples: float = 0.0
    seconds: float = 0.0
    validation: float = 0.0
    """Seconds of a validation, on average."""

    def times(self, period: Period, epoch_samples: int | None) -> float:
        """Return the number of periods in it."""
        if period.seconds is not None:
            return self.seconds / period.seconds
        if period.unit == "epochs":
            return self.samples / (period.amount * (epoch_samples or math.inf))
        return (self.tokens if period.unit == "tokens" else self.steps) / period.amount


def total_of(
    length: Period, samples: Sequence[StepSample], epoch_samples: int | None, until: float = 1.0
) -> Total:
    """Add up the steps of a run of some ``length``, or of its part before the fraction ``until``.

    Between two ``samples``, all numbers are interpolated linearly.
    """
    pieces = PIECES if len(samples) > 1 else 1
    rows = []
    for number in range(pieces):
        here = _between(samples, (number + 0.5) / pieces * until)
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
    """Return whether a later step may differ from the first, as far as the settings show.

    That is so if a plugin that acts at every step does something else than shape the update, or
    has a period among its settings.
    """
    return any(
        hooks(one) & STEPPING and (role_of(one) not in SHAPING_ROLES or _has_period(one))
        for one in composed.plugins.values()
        if not follows(one)
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


def _between(samples: Sequence[StepSample], at: float) -> StepSample:
    after = bisect_right(samples, at, key=lambda sample: sample.at)
    if after in (0, len(samples)):
        return samples[min(after, len(samples) - 1)]
    left, right = samples[after - 1], samples[after]
    part = (at - left.at) / (right.at - left.at)
    mixed: Any = [a + part * (b - a) for a, b in zip(left, right, strict=True)]
    return StepSample(*mixed)
