"""Suggest a learning rate from a curve of losses over learning rates."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from statistics import median
from typing import NamedTuple

from fundamentallm_tuning.units import toml_float

REACH = 1 / 20
"""Fraction of the curve on each side with which a loss is averaged."""

CERTAIN = 6.0
"""Smallest fall of the loss in standard errors. Of 1,000 curves of noise alone, fewer than 1 fall
that far if the noise is normal, and fewer than 25 however skewed or coarse it is."""
LEAST = 0.01
"""Smallest fall as a fraction of the loss, however little noise there is."""


class Choice(NamedTuple):
    """Learning rates that a curve suggests."""

    steepest: float
    """Where the loss falls fastest over the logarithm of the rate."""
    lowest: float
    """Where the loss is lowest: too large for a whole run; a tenth of it is a common choice."""
    loss: float
    """The averaged loss at ``lowest``."""

    def lines(self) -> list[str]:
        """Return both as lines of the report."""
        tenth = toml_float(self.lowest / 10)
        return [
            f"it falls fastest at {toml_float(self.steepest)}, which is suggested below",
            f"it is lowest, {self.loss:.4g}, at {toml_float(self.lowest)}; its tenth is {tenth}",
        ]


class Curve(NamedTuple):
    """Losses after updates with growing learning rates, each a constant factor apart."""

    rates: list[float]
    losses: list[float]

    @property
    def reach(self) -> int:
        """Number of neighbours on each side with which a loss is averaged."""
        return max(round(REACH * len(self.losses)), 1)

    def smoothed(self) -> list[float]:
        """Return each loss averaged with its neighbours; nearer ones have larger weights.

        A running mean would have a lag, and so suggest larger rates.
        """
        found, count = list[float](), len(self.losses)
        for at in range(count):
            reach = min(self.reach, at, count - 1 - at)  # symmetric at the ends too
            near = range(-reach, reach + 1)
            weights = [reach + 1 - abs(offset) for offset in near]
            parts = [w * self.losses[at + o] for w, o in zip(weights, near, strict=True)]
            found.append(math.fsum(parts) / sum(weights))
        return found

    def falls_to(self, bottom: int, lowest: float) -> bool:
        """Return whether the averaged loss at ``bottom`` is below the begin of the curve by more
        than noise explains: noise alone has a lowest point, too."""
        begin = self.losses[: max(bottom // 5, 1)]
        fall = math.fsum(begin) / len(begin) - lowest
        weights = range(1, self.reach + 1)
        whole = 2 * sum(weights) + self.reach + 1
        share = (2 * sum(w * w for w in weights) + (self.reach + 1) ** 2) / whole**2
        error = self.noise(bottom) * math.sqrt(share + 1 / len(begin))
        return fall > max(CERTAIN * error, LEAST * abs(self.losses[0]))

    def noise(self, bottom: int) -> float:
        """Return the standard deviation of the losses around the curve.

        It is estimated from the distance of each loss up to ``bottom`` to the mean of its two
        neighbours, which a steep fall hardly changes. The distance to an average that contains the
        loss would be too small. A lower bound is the median difference of neighbours over the
        whole curve, since there may be few losses before ``bottom``.
        """
        bends = [
            abs(b - (a + c) / 2)
            for a, b, c in zip(self.losses, self.losses[1:], self.losses[2:], strict=False)
        ]
        before = bends[: bottom + self.reach - 1]
        # In a normal distribution, half of the values are within 0.6745 standard deviations; their
        # mean distance is sqrt(2 / pi). The mean of two neighbours adds half of the variance.
        mean = math.fsum(before) / len(before) * math.sqrt(math.pi / 3)
        typical = median(abs(b - a) for a, b in pairwise(self.losses)) / (0.6745 * math.sqrt(2))
        return max(mean, typical)

    def drawn(self, mark: float, width: int = 60, height: int = 12) -> list[str]:
        """Draw the averaged curve over the logarithm of the rate, with a column at ``mark``."""
        smooth = self.smoothed()
        low = min(smooth)
        # The losses of a divergence would flatten the rest of the curve.
        high = max(smooth[0], min(max(smooth), smooth[0] + (smooth[0] - low) / 2))
        span, wide = (high - low) or 1.0, math.log(self.rates[-1] / self.rates[0]) or 1.0
        canvas = [[" "] * width for _ in range(height)]
        column = _place(math.log(mark / self.rates[0]) / wide, width)
        for line in canvas:
            line[column] = "┊"
        for rate, loss in zip(self.rates, smooth, strict=True):
            x = _place(math.log(rate / self.rates[0]) / wide, width)
            canvas[_place(min((high - loss) / span, 1.0), height)][x] = "•"
        labels = [f"{high:.4g}", *[""] * (height - 2), f"{low:.4g}"]
        margin = max(map(len, labels))
        rows = [
            f"{label:>{margin}} │{''.join(line)}".rstrip()
            for label, line in zip(labels, canvas, strict=True)
        ]
        first, last = toml_float(self.rates[0]), toml_float(self.rates[-1])
        return [
            *rows,
            f"{'':>{margin}} └{'─' * width}",
            f"{'loss':>{margin}}  {first}{last:>{width - len(first)}}",
        ]


def choose(curve: Curve) -> Choice | None:
    """Return the rates that a curve suggests; None if the loss does not fall clearly."""
    smooth = curve.smoothed()
    inner = range(
        curve.reach, len(smooth) - curve.reach
    )  # the ends have fewer neighbours to average
    if len(inner) < 3:  # too few for a slope
        return None
    bottom = min(inner, key=smooth.__getitem__)
    if bottom == inner[0] or not curve.falls_to(bottom, smooth[bottom]):
        return None
    # A loss that only returns from a rise shows no learning.
    lows = list(accumulate(smooth, min))
    slopes = {at: lows[at + 1] - lows[at - 1] for at in range(inner[0], bottom)}
    steepest = min(slopes, key=slopes.__getitem__)
    return Choice(curve.rates[steepest], curve.rates[bottom], smooth[bottom])


def _place(x: float, cells: int) -> int:
    return min(max(round(x * (cells - 1)), 0), cells - 1)
