"""What the guard has against a step."""

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
    """A reason to reject a step: its kind, and what happened."""

    kind: Literal["memory", "loss", "gradient", "spike"]
    text: str

    def is_anothers(self, reasons: list[str]) -> bool:
        """Tell whether the fault is one that somebody else has rejected the step for.

        Gradients that overflow because a loss scale was too large are the business of whoever
        scales; a loss that is not finite is not.
        """
        return self.kind == "gradient" and any(not why.startswith(PREFIX) for why in reasons)


def find_fault(guard: Guard, loss: float, gradient: float) -> Fault | None:
    """Return what a guard has against a step with this mean loss and largest gradient."""
    if guard.nonfinite != "off" and not math.isfinite(loss):
        return Fault("loss", f"the loss is {loss}")
    # Before the gradients: those of a spike may well overflow, in fp16 above all.
    if guard.spike != "off" and len(guard.losses) >= guard.spike_window:
        limit = spikes.limit(guard.losses, guard.spike_threshold)
        if loss > limit:
            return Fault("spike", f"the loss {loss:.6g} is a spike, which begins at {limit:.6g}")
    if guard.nonfinite != "off" and not math.isfinite(gradient):
        return Fault("gradient", f"the loss is {loss:.6g}, but a gradient is {gradient}")
    return None
