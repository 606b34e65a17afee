"""Clip the gradients of each step, by their global norm or value by value."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from fundamentallm import field, gt, hookimpl, optional, plugin

if TYPE_CHECKING:
    from fundamentallm import Run


@plugin
class GradClip:
    """Keep gradients small: scale their global norm down, or cut each of their values.

    Logs the norm as it was before clipping. Nothing here waits for the device.
    """

    produces: ClassVar[tuple[str, ...]] = ("optim/grad_norm",)

    max_norm: float | None = field(default=None, validator=optional(gt(0)))
    """Scale all gradients by one factor so that their global norm is at most this."""
    max_value: float | None = field(default=None, validator=optional(gt(0)))
    """Or cut every single value to between minus this and this."""
    norm_type: float = field(default=2.0, validator=gt(0))
    """The p of the norm that is limited and logged; `inf` is the largest absolute value."""

    _clip: Callable[..., Any] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.max_norm is None and self.max_value is None:
            raise ValueError("max_norm: is missing; state max_norm or max_value")
        if self.max_norm is not None and self.max_value is not None:
            raise ValueError("max_value: state max_norm or max_value, not both")

    @hookimpl
    def on_train_start(self) -> None:
        """Choose the way to clip, so that no step has to."""
        from fundamentallm_grad_clip.clip import clip_norm, clip_value

        self._clip = clip_norm if self.max_value is None else clip_value

    @hookimpl
    def edit_gradients(self, run: Run) -> None:
        """Clip the gradients, and log their norm as it was before."""
        norm = self._clip(run.parameters, self.max_norm or self.max_value, self.norm_type)
        run.log("optim/grad_norm", norm)
