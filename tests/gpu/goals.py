"""Goals, and the statistics that decide whether they are met."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Ratio:
    """A median of ratios, and the interval that holds the true one in 19 of 20 measurements."""

    value: float
    low: float
    high: float

    @property
    def interval(self) -> str:
        return f"95%: {self.low:.4f} to {self.high:.4f}"


@dataclass(frozen=True)
class Goal:
    """A figure with its bound."""

    text: str
    value: float
    at_least: float = -math.inf
    at_most: float = math.inf

    @property
    def met(self) -> bool:
        return self.at_least <= self.value <= self.at_most

    def line(self, *, dry: bool) -> str:
        """Return the figure as one line. A dry execution has no verdict."""
        bound = (
            f"at most {self.at_most}" if self.at_most < math.inf else f"at least {self.at_least}"
        )
        verdict = "DRY" if dry else "PASS" if self.met else "FAIL"
        return f"{verdict}: {self.text} {self.value:.4f} ({bound})"


def median_ratio(numerators: list[float], denominators: list[float]) -> Ratio:
    """Return the median ratio of pairs that were measured one after the other."""
    ratios = sorted(a / b for a, b in zip(numerators, denominators, strict=True))
    # The order statistics between which the true median is in 19 of 20 measurements.
    count = len(ratios)
    away = min(round(0.98 * math.sqrt(count)), (count - 1) // 2)
    return Ratio(median(ratios), ratios[(count - 1) // 2 - away], ratios[count // 2 + away])


def quantile(values: list[float], q: float) -> float:
    """Return the smallest value that at least the fraction ``q`` of all does not exceed."""
    return sorted(values)[max(math.ceil(q * len(values)), 1) - 1]
