"""Decide whether to reject a step, from its loss and its gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs

from fundamentallm_guard import spikes

if TYPE_CHECKING:
    from fundamentallm import Cause, Rejection
    from fundamentallm_guard import Guard


@attrs.frozen
class Fault:
    """Why the guard rejects a step: a cause to decide by, and a text to print."""

    cause: Cause
    text: str

    def is_overflow(self, rejected: list[Rejection]) -> bool:
        """Return whether the plugin that scales the loss rejected the step for the same gradients.

        That plugin then lowers its scale. A loss that is not finite belongs to the guard.
        """
        causes = {one.cause for one in rejected}
        return self.cause == "nonfinite_gradient" and "overflow" in causes


def find_fault(guard: Guard, loss: float, gradient: float) -> Fault | None:
    """Return the fault of a step with this mean loss and largest gradient, or None."""
    if guard.nonfinite != "off" and not math.isfinite(loss):
        return Fault("nonfinite_loss", f"the loss is {loss}")
    # Before the gradients: those of a spike may well overflow, above all in fp16.
    if guard.spike != "off" and len(guard.losses) >= guard.spike_window:
        limit = spikes.limit(guard.losses, guard.spike_threshold)
        if loss > limit:
            return Fault("spike", f"the loss {loss:.6g} is a spike: the limit is {limit:.6g}")
    if guard.nonfinite != "off" and not math.isfinite(gradient):
        return Fault("nonfinite_gradient", f"the loss is {loss:.6g}, but a gradient is {gradient}")
    return None
