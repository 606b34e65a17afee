"""Decide whether to reject a step, from its loss and its gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fundamentallm import Rejection
from fundamentallm_guard import spikes

if TYPE_CHECKING:
    from fundamentallm_guard import Guard


def find_rejection(guard: Guard, loss: float, gradient: float) -> Rejection | None:
    """Return why to reject a step with this mean loss and largest gradient, or None."""
    if guard.nonfinite != "off" and not math.isfinite(loss):
        return Rejection("nonfinite_loss", f"the loss is {loss}")
    # Before the gradients: those of a spike may well overflow, above all in fp16.
    if guard.spike != "off" and len(guard.losses) >= guard.spike_window:
        limit = spikes.limit(guard.losses, guard.spike_threshold)
        if loss > limit:
            return Rejection("spike", f"the loss {loss:.6g} is a spike: the limit is {limit:.6g}")
    if guard.nonfinite != "off" and not math.isfinite(gradient):
        text = f"the loss is {loss:.6g}, but a gradient is {gradient}"
        return Rejection("nonfinite_gradient", text)
    return None


def is_overflow(mine: Rejection, rejected: list[Rejection]) -> bool:
    """Return whether the plugin that scales the loss rejected the step for the same gradients.

    That plugin then lowers its scale. A loss that is not finite belongs to the guard.
    """
    return mine.cause == "nonfinite_gradient" and "overflow" in {one.cause for one in rejected}
