"""Clip the gradients of each step, by their global norm or value by value."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from fundamentallm import field, gt, hookimpl, optional, plugin

if TYPE_CHECKING:
    from fundamentallm import Run


@plugin
class GradClip:
    """Clip the gradients by their global norm or value by value, and log the norm before clipping.

    Without settings the global norm is limited to 1.0. The host never waits for the device.
    """

    role = "training"
    produces: ClassVar[tuple[str, ...]] = ("optim/grad_norm",)

    max_norm: float | None = field(default=None, validator=optional(gt(0)))
    """Scale all gradients by one factor so that their global norm is at most this. By default 1.0,
    unless `max_value` is set."""
    max_value: float | None = field(default=None, validator=optional(gt(0)))
    """Instead of limiting the norm, limit every gradient value to between minus this and this."""
    norm_type: float = field(default=2.0, validator=gt(0))
    """The p of the p-norm that is limited and logged; `inf` is the largest absolute value."""

    _clip: Callable[..., Any] = field(init=False, repr=False)
    _limit: float = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.max_norm is not None and self.max_value is not None:
            raise ValueError("max_value: set max_norm or max_value, not both")

    @hookimpl
    def on_train_start(self) -> None:
        """Choose the clipping function once, so that no step has to."""
        from fundamentallm_grad_clip.clip import clip_norm, clip_value

        self._clip, self._limit = clip_norm, 1.0 if self.max_norm is None else self.max_norm
        if self.max_value is not None:
            self._clip, self._limit = clip_value, self.max_value

    @hookimpl
    def edit_gradients(self, run: Run) -> None:
        """Clip the gradients, and log their norm before clipping."""
        norm = self._clip(run, self._limit, self.norm_type)
        run.log("optim/grad_norm", norm)
