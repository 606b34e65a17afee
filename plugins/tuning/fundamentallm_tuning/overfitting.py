"""One batch again and again: what can learn anything can learn this by heart."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from fundamentallm import (
    Composed,
    FundamentalError,
    NotFiniteError,
    Rejection,
    field,
    hookimpl,
    plugin,
    train,
)
from fundamentallm_tuning.trial import ended, lean, scratch, window_loss

if TYPE_CHECKING:
    from fundamentallm import Batch, Run

NEAR_ZERO = 0.05
FRACTION = 1 / 20
"""Of the first loss: where that is small, ``NEAR_ZERO`` alone would say nothing."""

STEPS = 300
"""By default; where the loss still falls after these, as many again,"""
AGAIN = 4
"""so many times."""


@plugin
class OneWindow:
    """Give every step the first window, and stop when its loss is near zero, or after ``steps`` no
    longer falls."""

    steps: int

    tell: Any = field(init=False, default=None)
    losses: list[float] = field(init=False, factory=list)
    _window: Any = field(init=False, default=None)

    @property
    def goal(self) -> float:
        """What the loss has to come down to."""
        return min(NEAR_ZERO, FRACTION * abs(self.losses[0]))

    @property
    def learned(self) -> bool:
        """Whether it has."""
        return self.losses[-1] <= self.goal

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Leave dropout out: with it, no loss comes near zero."""
        from torch import nn

        run.module.eval()
        # These say of each other what to do in training, and some cannot go back otherwise.
        kept = (nn.RNNBase, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        for module in run.module.modules():
            if isinstance(module, kept):
                module.train()

    @hookimpl(wrapper=True)
    def collect_batches(self) -> Generator[None, list[Batch], list[Batch]]:
        """Return the first window in place of any later one."""
        window = yield
        if self._window is None:
            self._window = window
        kept: list[Batch] = self._window
        return kept

    @hookimpl
    def judge_step(self, run: Run) -> Rejection | None:
        """Look at the loss; reject the step where it is near zero, or no number: it is the last."""
        self.losses.append(window_loss(run))
        if len(self.losses) % max(self.steps // 10, 1) == 1 % max(self.steps // 10, 1):
            self.tell(f"step {len(self.losses):>6}  loss {self.losses[-1]:.4g}")
        if self.learned or not math.isfinite(self.losses[-1]):
            run.stop("the loss is near zero" if self.learned else "the loss is no number")
            return Rejection("other", str(run.stop_reason))
        done = len(self.losses)
        if done >= self.steps and not done % self.steps and not still_falls(self.losses):
            run.stop("the loss no longer falls")
            return Rejection("other", str(run.stop_reason))
        return None


def learn(composed: Composed, steps: int | None, tell: Callable[[str], object]) -> str:
    """Train on the first window for so many ``steps``, and return what to say of it.

    Without a number, for as long as the loss still falls, within limits.

    Raises ``NotFiniteError`` if the loss becomes NaN or infinite, ``FundamentalError`` if it does
    not come near zero in time.
    """
    one = OneWindow(steps=steps or STEPS)
    one.tell = tell
    with scratch() as folder:
        ended(train(lean(composed, steps or AGAIN * STEPS, one), run_dir=folder / "run"))
    losses, done = one.losses, len(one.losses)
    if not math.isfinite(losses[-1]):
        raise NotFiniteError(
            f"step {done}: the loss on one batch is {losses[-1]}; try a smaller learning rate "
            f"(fundamentallm lr-finder), and look at what the model computes from this batch"
        )
    if not one.learned:
        raise FundamentalError(
            f"the loss on one batch is {losses[-1]:.4g} after {done} steps; it began at "
            f"{losses[0]:.4g}, and near zero is {one.goal:.4g}. {advice(losses)}"
        )
    return (
        f"the loss on one batch fell from {losses[0]:.4g} to {losses[-1]:.4g} in {done - 1} "
        f"updates: this model can learn from this data"
    )


def still_falls(losses: list[float]) -> bool:
    """Tell whether the last fifth of the steps has taken anything off the loss."""
    return losses[-1] < 0.97 * losses[-max(len(losses) // 5, 1)]


def advice(losses: list[float]) -> str:
    """Return what to look at, from how the losses went."""
    first, last, lowest = losses[0], losses[-1], min(losses)
    if last > 1.2 * first:
        return "It rises: the learning rate may be too large (fundamentallm lr-finder)."
    if lowest > 0.9 * first:
        return (
            "It hardly falls: see whether gradients reach the weights (fundamentallm check), "
            "whether the targets follow from the inputs, whether the learning rate is not too "
            "small (fundamentallm lr-finder) and whether anything is frozen."
        )
    if last > 1.5 * lowest:
        return f"It was at {lowest:.4g} and rose again: try a smaller learning rate."
    if still_falls(losses):
        return "It is still falling: try more --steps, a larger learning rate or a smaller batch."
    return (
        "It has come to a halt: the model may be too small for the batch, equal inputs may "
        "have different targets, or the loss may have a floor (label smoothing)."
    )
