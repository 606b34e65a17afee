"""The learning-rate range test: raise the learning rate in each step and record the loss.

Smith, "Cyclical Learning Rates for Training Neural Networks" (2017, arXiv:1506.01186), section
3.3; here the rate grows by the same factor in each step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fundamentallm import (
    Composed,
    FundamentalError,
    NotFiniteError,
    Rejection,
    SettingsError,
    answering,
    command_line,
    field,
    hookimpl,
    plugin,
    train,
)
from fundamentallm_tuning.lr_curve import Curve, choose
from fundamentallm_tuning.trial import ended, lean, scratch, window_loss
from fundamentallm_tuning.units import toml_float

if TYPE_CHECKING:
    from fundamentallm import Run

RISE = 2.0
"""Multiple of the first loss at which the test ends."""
BOUNCE = 4.0
"""Multiple of the lowest loss at which the test ends."""
MEMORY = 0.8
"""Decay of the running mean of the loss that is compared with these."""


@plugin
class RangeTest:
    """Raise the learning rate from ``low`` to ``high``; stop when the loss diverges."""

    low: float
    high: float
    steps: int

    rates: list[float] = field(init=False, factory=list)
    """The learning rates of the updates."""
    losses: list[float] = field(init=False, factory=list)
    """The losses of the steps; the loss of a step shows the effect of the update before it."""
    bases: list[float] = field(init=False, factory=list)
    diverged: bool = field(init=False, default=False)
    _mean: float = field(init=False, default=0.0)
    _lowest: float = field(init=False, default=math.inf)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Check that the optimizer has a learning rate to scale."""
        self.bases = [float(base) for base in run.base_lrs]
        if not self.bases[0] > 0:
            raise SettingsError("the optimizer's learning rate is 0: the test needs one to scale")

    @hookimpl
    def lr_factor(self, run: Run) -> float:
        """Return the factor that gives the first group the learning rate of this step."""
        x = run.progress.step / max(self.steps - 1, 1)
        rate: float = self.low * (self.high / self.low) ** x
        return rate / self.bases[0]

    @hookimpl
    def judge_step(self, run: Run) -> Rejection | None:
        """Record the loss; reject the step and end the test if it has diverged."""
        loss = window_loss(run)
        self.losses.append(loss)
        self._mean = MEMORY * self._mean + (1 - MEMORY) * loss
        mean = self._mean / (1 - MEMORY ** len(self.losses))
        self._lowest = min(self._lowest, mean)
        bounds = (RISE * self.losses[0], BOUNCE * self._lowest)
        self.diverged = not math.isfinite(loss) or (loss > 0 and mean > min(bounds))
        if not self.diverged:
            return None
        run.stop("the loss has diverged")
        return Rejection("other", "the loss has diverged")

    @hookimpl
    def settle_step(self, run: Run) -> None:
        """Record the rate of the update; a rejected step has that of the update before it."""
        self.rates.append(run.progress.lr)

    def curve(self) -> Curve:
        """Return the finite losses after each rate."""
        pairs = zip(self.rates, self.losses[1:], strict=False)
        kept = [(rate, loss) for rate, loss in pairs if math.isfinite(loss) and rate > 0]
        return Curve([rate for rate, _ in kept], [loss for _, loss in kept])


def run_test(composed: Composed, low: float, high: float, steps: int) -> RangeTest:
    """Run the test in a temporary folder."""
    test = RangeTest(low=low, high=high, steps=steps)
    with scratch() as folder:
        ended(train(lean(composed, steps, test), run_dir=folder / "run"))
    return test


def report(composed: Composed, test: RangeTest) -> list[str]:
    """Return the report of a test: curve, suggestion, and the setting to paste.

    Raises ``NotFiniteError`` if the loss diverged at once, ``FundamentalError`` if it never fell.
    """
    curve = test.curve()
    done, low, high = len(test.losses), toml_float(test.low), toml_float(test.high)
    if test.diverged and len(curve.losses) < 5:
        raise NotFiniteError(
            f"the loss was {', '.join(f'{loss:.4g}' for loss in test.losses)}: it diverges at "
            f"once. If the first one is not finite, the model or the data has a mistake: try "
            f"'{command_line('check')}'. Else try a smaller --min than {low}"
        )
    found = choose(curve)
    if found is None:
        raise FundamentalError(
            f"the loss never fell clearly between {low} and {high}, in {done} steps: it began at "
            f"{test.losses[0]:.4g} and was {min(test.losses):.4g} at best. Try a larger --max or "
            f"more --steps, or '{command_line('check', '--overfit-one-batch')}' to see whether it "
            f"can fall"
        )
    lines = [*curve.drawn(found.steepest), "", _end(test, done, high), *found.lines(), ""]
    return [*lines, *_setting(composed, test, found.steepest)]


def _end(test: RangeTest, done: int, high: str) -> str:
    if test.diverged:
        return f"the loss diverged at {test.rates[-2]:.1e}, after {done} of {test.steps} steps"
    return f"the loss did not diverge up to {high}, in {done} steps"


def _setting(composed: Composed, test: RangeTest, rate: float) -> list[str]:
    name = answering(composed.plugins, "build_optimizer") or ""
    stated = getattr(composed.plugins[name], "lr", None)
    several = sorted(set(test.bases))
    lines = []
    if len(several) > 1:
        shown = ", ".join(f"{base:.3g}" for base in several)
        factor = f"{rate / test.bases[0]:.3g}"
        lines = [
            f"# The groups' learning rates ({shown}) were all scaled by {factor}.",
            "# Scale those that have settings of their own by it, too.",
        ]
    if not isinstance(stated, int | float) or not stated > 0:
        return [
            *lines,
            f"# {name} has no setting lr; the first parameter group's learning rate:",
            f"# {toml_float(rate)}",
        ]
    # The plugin may derive the learning rate from its setting.
    return [*lines, f"[{name}]", f"lr = {toml_float(rate * stated / test.bases[0])}"]
