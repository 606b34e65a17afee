"""Train on one batch repeatedly: a model that can learn anything can memorize it."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from fundamentallm import (
    Composed,
    FundamentalError,
    NotFiniteError,
    Rejection,
    command_line,
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
"""Fraction of the first loss to reach, for first losses near ``NEAR_ZERO``."""

STEPS = 300
"""Default number of steps; while the loss still falls, as many again."""
ROUNDS = 4
"""Largest number of such rounds."""


@plugin
class OneWindow:
    """Train on the first window in every step; stop when its loss is near zero, or no longer falls
    after ``steps``."""

    steps: int

    show: Any = field(init=False, default=None)
    losses: list[float] = field(init=False, factory=list)
    _window: Any = field(init=False, default=None)

    @property
    def goal(self) -> float:
        """The loss to reach."""
        return min(NEAR_ZERO, FRACTION * abs(self.losses[0]))

    @property
    def learned(self) -> bool:
        """Whether the loss has reached the goal."""
        return self.losses[-1] <= self.goal

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Disable dropout: with it, no loss comes near zero."""
        from torch import nn

        run.module.eval()
        # Their mode decides about more than dropout, and cuDNN's RNNs need it for backward.
        kept = (nn.RNNBase, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        for module in run.module.modules():
            if isinstance(module, kept):
                module.train()

    @hookimpl(wrapper=True)
    def collect_batches(self) -> Generator[None, list[Batch], list[Batch]]:
        """Return the first window in place of later ones."""
        window = yield
        if self._window is None:
            self._window = window
        kept: list[Batch] = self._window
        return kept

    @hookimpl
    def judge_step(self, run: Run) -> Rejection | None:
        """Check the loss; reject the step and stop where it is near zero or not finite."""
        self.losses.append(window_loss(run))
        if len(self.losses) % max(self.steps // 10, 1) == 1 % max(self.steps // 10, 1):
            self.show(f"step {len(self.losses):>6}  loss {self.losses[-1]:.4g}")
        if self.learned or not math.isfinite(self.losses[-1]):
            run.stop("the loss is near zero" if self.learned else "the loss is not finite")
            return Rejection("other", str(run.stop_reason))
        done = len(self.losses)
        if done >= self.steps and not done % self.steps and not still_falls(self.losses):
            run.stop("the loss no longer falls")
            return Rejection("other", str(run.stop_reason))
        return None


def learn(composed: Composed, steps: int | None, show: Callable[[str], object]) -> str:
    """Train on the first window for ``steps``, and return the verdict as a line.

    Without ``steps``, train for as long as the loss falls, within limits.

    Raises ``NotFiniteError`` if the loss becomes NaN or infinite, ``FundamentalError`` if it does
    not come near zero in time.
    """
    one = OneWindow(steps=steps or STEPS)
    one.show = show
    with scratch() as folder:
        ended(train(lean(composed, steps or ROUNDS * STEPS, one), run_dir=folder / "run"))
    losses, done = one.losses, len(one.losses)
    if not math.isfinite(losses[-1]):
        raise NotFiniteError(
            f"step {done}: the loss on one batch is {losses[-1]}; try a smaller learning rate "
            f"({command_line('lr-finder')}), and inspect what the model computes from this batch"
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
    """Return whether the loss fell in the last fifth of the steps."""
    return losses[-1] < 0.97 * losses[-max(len(losses) // 5, 1)]


def advice(losses: list[float]) -> str:
    """Return advice that fits the course of the losses."""
    first, last, lowest = losses[0], losses[-1], min(losses)
    if last > 1.2 * first:
        return f"It rises: the learning rate may be too large ({command_line('lr-finder')})."
    if lowest > 0.9 * first:
        return (
            "It hardly falls: check whether gradients reach the weights "
            f"({command_line('check')}), whether the targets follow from the inputs, whether "
            f"the learning rate is too small ({command_line('lr-finder')}) and whether weights "
            "are frozen."
        )
    if last > 1.5 * lowest:
        return f"It was at {lowest:.4g} and rose again: try a smaller learning rate."
    if still_falls(losses):
        return "It is still falling: try more --steps, a larger learning rate or a smaller batch."
    return (
        "It no longer falls: the model may be too small for the batch, equal inputs may "
        "have different targets, or the loss may have a floor (label smoothing)."
    )
