"""The loss scale of fp16: torch's ``GradScaler``, called in the phases of a step.

Micikevicius et al., "Mixed Precision Training" (2018, arXiv:1710.03740), section 3.2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fundamentallm import Run


class OverflowProbe:
    """A stand-in for an optimizer that records whether a ``GradScaler`` would update.

    ``GradScaler.step`` calls the optimizer's ``step`` exactly if no gradient overflowed. This one
    records the call and changes nothing, so that overflow is known before the real update. It is no
    ``torch.optim.Optimizer``, so that torch's global optimizer hooks are not called.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        # All parameters of the model, so that gradients which no optimizer uses are unscaled too.
        self.param_groups = [{"params": parameters}]
        self.accepts = True

    def step(self) -> None:
        """Record that a ``GradScaler`` would update."""
        self.accepts = True


class LossScale:
    """A dynamic loss scale over the gradients of ``parameters``.

    The calls of a step are ``backward`` for each micro-batch, ``unscale``, ``overflows`` and
    ``settle``.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler, parameters: list[nn.Parameter], device: str
    ) -> None:
        self.scaler = scaler
        self.parameters = parameters
        self.probe = OverflowProbe(parameters)
        self.one = torch.ones((), device=device)
        self.scaled = False  # whether ``backward`` made the current gradients

    def backward(self, loss: Tensor) -> None:
        """Backpropagate the loss times the scale."""
        self.scaled = True
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self) -> bool:
        """Divide the gradients by the scale.

        Return False if there are gradients that ``backward`` did not make.
        """
        have_gradients = any(parameter.grad is not None for parameter in self.parameters)
        if have_gradients and not self.scaled:
            return False
        self.scaled = have_gradients
        if have_gradients:
            self.scaler.unscale_(cast("Optimizer", self.probe))
        return True

    def overflows(self) -> bool:
        """Return whether a gradient is infinite or NaN. The host waits for the device here."""
        self.probe.accepts = not self.scaled
        if self.scaled:
            self.scaler.step(cast("Optimizer", self.probe))
        return not self.probe.accepts

    def settle(self, counts: bool = True) -> bool:
        """Update the scale: back off after an overflow, or grow when due.

        Return whether it backed off. A step that does not count changes nothing.
        """
        if self.scaled and counts:
            self.scaler.update()
        elif self.scaled:  # given its own scale, a GradScaler ends the step and keeps its counter
            self.scaler.update(self.scaler.get_scale())
        self.scaled = False
        return counts and not self.probe.accepts

    def scale(self) -> Tensor:
        """Return the scale, a 0-d tensor on the device that does not change later."""
        return self.scaler.scale(self.one)

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint: the scale, and the steps since its last change."""
        full = self.scaler.state_dict()
        return {"scale": full["scale"], "growth_tracker": full["_growth_tracker"]}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint; the growth rule is that of the settings."""
        found = {"scale": state["scale"], "_growth_tracker": state["growth_tracker"]}
        self.scaler.load_state_dict(self.scaler.state_dict() | found)


def diagnose(run: Run) -> str:
    """Return what is not finite in the current step. Reads device values."""
    losses = [float(loss) for loss in run.losses]
    bad = [loss for loss in losses if not math.isfinite(loss)]
    if bad:
        return f"the loss itself is {bad[0]}: look at the data and the model before the scale"
    names = [
        name
        for name, parameter in run.model.named_parameters()
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
    ]
    found = f"the loss is {losses[-1]:g}, but the gradient of {names[0]} is not finite"
    return f"{found}, and those of {len(names) - 1} more" if names[1:] else found
