"""Decide whether to reject a step, from its loss and its gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import attrs

from fundamentallm_guard import spikes

if TYPE_CHECKING:
    from fundamentallm_guard import Guard

PREFIX = "guard: "


@attrs.frozen
class Fault:
    """Why the guard rejects a step: a kind to decide by, and a text to print."""

    kind: Literal["memory", "loss", "gradient", "spike"]
    text: str

    def is_anothers(self, reasons: list[str]) -> bool:
        """Return whether another plugin has rejected the step for the same fault.

        Gradients that overflow because the loss scale was too large belong to the plugin that
        scales the loss. A loss that is not finite belongs to the guard.
        """
        return self.kind == "gradient" and any(not why.startswith(PREFIX) for why in reasons)


def find_fault(guard: Guard, loss: float, gradient: float) -> Fault | None:
    """Return the fault of a step with this mean loss and largest gradient, or None."""
    if guard.nonfinite != "off" and not math.isfinite(loss):
        return Fault("loss", f"the loss is {loss}")
    # Before the gradients: those of a spike may well overflow, above all in fp16.
    if guard.spike != "off" and len(guard.losses) >= guard.spike_window:
        limit = spikes.limit(guard.losses, guard.spike_threshold)
        if loss > limit:
            return Fault("spike", f"the loss {loss:.6g} is a spike: the limit is {limit:.6g}")
    if guard.nonfinite != "off" and not math.isfinite(gradient):
        return Fault("gradient", f"the loss is {loss:.6g}, but a gradient is {gradient}")
    return None
