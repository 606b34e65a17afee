"""What the guard reads of a step: its losses and its gradients, in one go each."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.utils import get_total_norm

if TYPE_CHECKING:
    from torch import nn

    from fundamentallm import Run


class Check:
    """Whether losses and gradients are finite: one number, and so one wait of the host.

    It uses the operation with which ``torch.amp.GradScaler`` looks for overflows, with a scale of
    one, which leaves every bit as it is: a tenth of what a norm of all gradients takes.
    """

    def __init__(self, device: str) -> None:
        self._found = torch.zeros((), device=device)
        self._one = torch.ones((), device=device)
        self._works = True

    def passes(self, run: Run, parameters: list[nn.Parameter]) -> bool:
        """Tell whether all is finite; False also if this cannot be told so."""
        if not self._works:
            return False
        values = [p.grad for p in parameters if p.grad is not None]
        values += run.losses
        try:
            torch._amp_foreach_non_finite_check_and_unscale_(values, self._found, self._one)
        except RuntimeError:  # complex or sparse gradients, a loss on another device
            self._works = False
            return False
        if self._found.item():
            self._found.zero_()  # for the next step; where nothing was found it is zero still
            return False
        return True


def of_step(run: Run, parameters: list[nn.Parameter]) -> tuple[float, float]:
    """Return the window's mean loss, and the largest absolute value in the gradients.

    Either is NaN or infinite if, and only if, something in it is. The host waits for the device
    once. With several processes it is the mean over them, so that all decide alike.
    """
    # The infinity norm: any other may overflow though every gradient is finite.
    largest = get_total_norm([p.grad for p in parameters if p.grad is not None], math.inf)
    values = [*run.losses, largest]
    if values[0].device != largest.device:  # the norm of no gradients at all is the host's
        values = [value.cpu() for value in values]
    *losses, gradient = torch.stack(values).tolist()
    if len(losses) == 1:
        loss = losses[0]
    else:
        weights = [batch.weight for batch in run.window]
        loss = _sum([w * x for w, x in zip(weights, losses, strict=True)]) / sum(weights)
    if run.world_size == 1:
        return loss, gradient
    metrics = {"guard/loss": loss, "guard/gradient": gradient}
    agreed = run.hook.reduce_metrics(run=run, metrics=metrics)
    return agreed["guard/loss"], agreed["guard/gradient"]


def _sum(values: list[float]) -> float:
    # fsum refuses infinity minus infinity; that sum is NaN.
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
