"""What a curve of losses over learning rates says."""

from __future__ import annotations

import math
from statistics import median
from typing import NamedTuple

from fundamentallm_tuning.units import toml_float

REACH = 3
"""How many neighbours on each side a loss is averaged with."""


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
        return [
            f"it falls fastest at {self.steepest:.1e}, which is suggested below",
            f"it is lowest, {self.loss:.4g}, at {self.lowest:.1e}; a tenth of that is "
            f"{toml_float(self.lowest / 10)}",
        ]


class Curve(NamedTuple):
    """Losses after updates with growing learning rates, each a constant factor apart."""

    rates: list[float]
    losses: list[float]

    def smoothed(self) -> list[float]:
        """Return each loss averaged with its neighbours, the nearer the more: this has no lag,
        unlike a running mean, which would move all that is read from it to larger rates."""
        found, count = [], len(self.losses)
        for at in range(count):
            reach = min(REACH, at, count - 1 - at)  # symmetric at the ends too
            near = range(-reach, reach + 1)
            weights = [reach + 1 - abs(offset) for offset in near]
            parts = [w * self.losses[at + o] for w, o in zip(weights, near, strict=True)]
            found.append(math.fsum(parts) / sum(weights))
        return found

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
        rows = [f"{label:>{margin}} │{''.join(line)}".rstrip()
                for label, line in zip(labels, canvas, strict=True)]  # fmt: skip
        first, last = toml_float(self.rates[0]), toml_float(self.rates[-1])
        return [*rows, f"{'':>{margin}} └{'─' * width}",
                f"{'loss':>{margin}}  {first}{last:>{width - len(first)}}"]  # fmt: skip


def choose(curve: Curve) -> Choice | None:
    """Return the rates that a curve suggests; None where the loss does not fall clearly."""
    smooth = curve.smoothed()
    if len(smooth) < 5:  # noqa: PLR2004 - no slope to speak of
        return None
    bottom = min(range(len(smooth)), key=smooth.__getitem__)
    # Noise alone has a lowest point too.
    noise = median(abs(a - b) for a, b in zip(curve.losses, smooth, strict=True))
    if bottom < 2 or max(smooth[:bottom]) - smooth[bottom] <= max(2 * noise, 1e-3 * abs(smooth[0])):  # noqa: PLR2004
        return None
    slopes = {at: smooth[at + 1] - smooth[at - 1] for at in range(1, bottom)}
    steepest = min(slopes, key=slopes.__getitem__)
    return Choice(curve.rates[steepest], curve.rates[bottom], smooth[bottom])


def _place(x: float, cells: int) -> int:
    return min(max(round(x * (cells - 1)), 0), cells - 1)
