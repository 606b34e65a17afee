"""The loss scale of fp16: torch's ``GradScaler``, asked at the moments that a step has.

Micikevicius et al., "Mixed Precision Training" (2018), section 3.2, say why a loss is scaled.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from fundamentallm import Run


class Verdict:
    """What a ``GradScaler`` takes for an optimizer, to learn what it thinks of the gradients.

    ``GradScaler.step`` makes the update exactly if no gradient overflowed. Here the "update" is a
    note that it would have been made, so that the verdict is known before the true one. It is no
    ``torch.optim.Optimizer``, since hooks on all optimizers should not hear of it.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        # All of the model's, so that gradients which no optimizer uses become true as well.
        self.param_groups = [{"params": parameters}]
        self.accepts = True

    def step(self) -> None:
        """Note that a ``GradScaler`` would update."""
        self.accepts = True


class Scaling:
    """A dynamic loss scale over the gradients of ``parameters``.

    In every step: ``backward`` for each micro-batch, ``unscale``, ``overflows``, ``settle``.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler, parameters: list[nn.Parameter], device: str
    ) -> None:
        self.scaler = scaler
        self.parameters = parameters
        self.verdict = Verdict(parameters)
        self.one = torch.ones((), device=device)
        self.scaled = False  # whether ``backward`` made the gradients at hand

    def backward(self, loss: Tensor) -> None:
        """Backpropagate the loss times the scale."""
        self.scaled = True
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self) -> bool:
        """Divide the gradients by the scale, where there are any.

        Return False if they cannot be: there are some that ``backward`` did not make.
        """
        there = any(parameter.grad is not None for parameter in self.parameters)
        if there and not self.scaled:
            return False
        self.scaled = there
        if there:
            self.scaler.unscale_(cast("Optimizer", self.verdict))
        return True

    def overflows(self) -> bool:
        """Tell whether a gradient is infinite or NaN. The host waits for the device here."""
        self.verdict.accepts = not self.scaled
        if self.scaled:
            self.scaler.step(cast("Optimizer", self.verdict))
        return not self.verdict.accepts

    def settle(self, counts: bool = True) -> bool:
        """Let the scale follow: back off, or grow when the time has come.

        Return whether it backed off. A step that does not count leaves everything as it was.
        """
        if self.scaled and counts:
            self.scaler.update()
        elif self.scaled:  # told its scale, a GradScaler forgets the step, and not how old that is
            self.scaler.update(self.scaler.get_scale())
        self.scaled = False
        return counts and not self.verdict.accepts

    def scale(self) -> Tensor:
        """Return the scale, a 0-d tensor on the device that does not change later."""
        return self.scaler.scale(self.one)

    def state(self) -> dict[str, float]:
        """Return what a checkpoint holds: the scale, and how far it is from growing."""
        full = self.scaler.state_dict()
        return {"scale": full["scale"], "growth_tracker": full["_growth_tracker"]}

    def restore(self, kept: dict[str, Any]) -> None:
        """Go on from what a checkpoint holds. By which rule is not in there: settings say that."""
        found = {"scale": kept["scale"], "_growth_tracker": kept["growth_tracker"]}
        self.scaler.load_state_dict(self.scaler.state_dict() | found)


def diagnosis(run: Run) -> str:
    """Say what of the step at hand is not finite. Reads the device."""
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
