"""What a curve of losses over learning rates says."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from statistics import median
from typing import NamedTuple

from fundamentallm_tuning.units import toml_float

REACH = 1 / 20
"""With how much of the curve on each side a loss is averaged."""

CERTAIN = 6.0
"""How many standard errors the loss has to fall by: of 1,000 curves of nothing but noise, fewer
than 1 do if that is normal, and fewer than 25 however skewed or coarse it is."""
LEAST = 0.01
"""What part of the loss it has to fall by, however little noise there is."""


class Choice(NamedTuple):
    """Learning rates that a curve suggests."""

    steepest: float
    """Where the loss falls fastest per factor of the rate."""
    lowest: float
    """Where it is lowest: too much for a whole run, but a tenth of it is a common choice."""
    loss: float
    """The loss there, averaged as all of these are."""

    def told(self) -> list[str]:
        """Tell them."""
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
        """How many neighbours on each side a loss is averaged with."""
        return max(round(REACH * len(self.losses)), 1)

    def smoothed(self) -> list[float]:
        """Return each loss averaged with its neighbours, the nearer the more: this has no lag,
        unlike a running mean, which would move all that is read from it to larger rates."""
        found, count = list[float](), len(self.losses)
        for at in range(count):
            reach = min(self.reach, at, count - 1 - at)  # symmetric at the ends too
            near = range(-reach, reach + 1)
            weights = [reach + 1 - abs(offset) for offset in near]
            parts = [w * self.losses[at + o] for w, o in zip(weights, near, strict=True)]
            found.append(math.fsum(parts) / sum(weights))
        return found

    def falls_to(self, bottom: int, lowest: float) -> bool:
        """Tell whether the averaged loss at ``bottom`` is lower than where the curve begins, by
        more than noise has it: noise alone has a lowest point too."""
        begin = self.losses[: max(bottom // 5, 1)]
        fall = math.fsum(begin) / len(begin) - lowest
        weights = range(1, self.reach + 1)
        whole = 2 * sum(weights) + self.reach + 1
        share = (2 * sum(w * w for w in weights) + (self.reach + 1) ** 2) / whole**2
        error = self.noise(bottom) * math.sqrt(share + 1 / len(begin))
        return fall > max(CERTAIN * error, LEAST * abs(self.losses[0]))

    def noise(self, bottom: int) -> float:
        """Return the standard deviation of a loss around the curve, from how it differs from the
        middle of its neighbours up to ``bottom``: a steep fall hardly adds to that. A distance from
        an average would be too small where the loss itself is a part of it.

        It is no less than what most neighbours differ by: before ``bottom`` there may be few.
        """
        bends = [
            abs(b - (a + c) / 2)
            for a, b, c in zip(self.losses, self.losses[1:], self.losses[2:], strict=False)
        ]
        before = bends[: bottom + self.reach - 1]
        # Of a normal distribution, half is within 0.6745 standard deviations, and the mean distance
        # is sqrt(2 / pi) of them; that of the middle of two neighbours adds half of the variance.
        mean = math.fsum(before) / len(before) * math.sqrt(math.pi / 3)
        typical = median(abs(b - a) for a, b in pairwise(self.losses)) / (0.6745 * math.sqrt(2))
        return max(mean, typical)

    def drawn(self, mark: float, width: int = 60, height: int = 12) -> list[str]:
        """Draw the averaged curve over the logarithm of the rate, with a column at ``mark``."""
        smooth = self.smoothed()
        low = min(smooth)
        # What diverges would flatten all the rest.
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
    """Return the rates that a curve suggests; None where the loss does not fall clearly."""
    smooth = curve.smoothed()
    inner = range(curve.reach, len(smooth) - curve.reach)  # beyond are those with less to average
    if len(inner) < 3:  # no slope to speak of
        return None
    bottom = min(inner, key=smooth.__getitem__)
    if bottom == inner[0] or not curve.falls_to(bottom, smooth[bottom]):
        return None
    # Where a loss only comes back from a rise, it has not learned.
    lows = list(accumulate(smooth, min))
    slopes = {at: lows[at + 1] - lows[at - 1] for at in range(inner[0], bottom)}
    steepest = min(slopes, key=slopes.__getitem__)
    return Choice(curve.rates[steepest], curve.rates[bottom], smooth[bottom])


def _place(x: float, cells: int) -> int:
    return min(max(round(x * (cells - 1)), 0), cells - 1)
