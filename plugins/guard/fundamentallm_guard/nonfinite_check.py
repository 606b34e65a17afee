"""Check the losses and the gradients of a step for NaN and infinity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.utils import get_total_norm

if TYPE_CHECKING:
    from torch import nn

    from fundamentallm import Run


def quick_check(run: Run) -> bool:
    """Return whether all losses and gradients are finite; False also where this cannot decide.

    It adds the losses to the norm of the gradients, which other plugins need as well, and reads one
    number. A finite sum means that all values are finite. Any other means NaN, infinity, or finite
    values whose squares overflow; then ``loss_and_gradient`` decides, which takes much longer.
    """
    losses = run.losses
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    norm = run.grad_norm()
    if norm.device != loss.device:
        return False
    return math.isfinite((norm + loss).item())


def loss_and_gradient(run: Run, parameters: list[nn.Parameter]) -> tuple[float, float]:
    """Return the window's mean loss and the largest absolute value of the gradients.

    Each is NaN or infinite exactly if a value in it is. One device read. With several processes,
    the values are averaged over them, so that all processes decide alike.
    """
    # The infinity norm: any other may overflow though every gradient is finite.
    largest = get_total_norm([p.grad for p in parameters if p.grad is not None], math.inf)
    values = [*run.losses, largest]
    if values[0].device != largest.device:  # the norm of an empty list is on the CPU
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
    agreed = run.hook.reduce_metrics(run=run, metrics=metrics, scope="step")
    return agreed["guard/loss"], agreed["guard/gradient"]


def _sum(values: list[float]) -> float:
    # fsum raises for infinity minus infinity; here that sum is NaN.
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
