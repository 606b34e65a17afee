"""Check the losses and the gradients of a step for NaN and infinity."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.utils import get_total_norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from fundamentallm import Run


def quick_check(run: Run) -> bool:
    """Return whether all losses and gradients are finite; False also where this cannot decide.

    It adds the losses to the norm of the gradients, which other plugins need as well, and reads one
    number. A finite sum means that all values are finite. Any other means NaN, infinity, or finite
    values whose squares overflow; then ``loss_and_gradient`` decides, which takes much longer.
    Several processes get the same answer.
    """
    losses = run.losses
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    norm = run.grad_norm()
    fine = norm.device == loss.device and math.isfinite((norm + loss).item())
    if run.world_size == 1:
        return fine
    return all(run.hook.agree(run=run, topic="guard: all is finite", mine=fine))


def loss_and_gradient(run: Run, parameters: list[nn.Parameter]) -> tuple[float, float]:
    """Return the window's mean loss and the largest absolute value of the gradients.

    Each is NaN or infinite exactly if a value in it is. One device read. The values are those of
    all processes.
    """
    # The infinity norm: any other may overflow though every gradient is finite.
    largest = get_total_norm(_parts_here(parameters), math.inf)
    values = [*run.losses, largest]
    if values[0].device != largest.device:  # the norm of an empty list is on the CPU
        values = [value.cpu() for value in values]
    *losses, gradient = torch.stack(values).tolist()
    if len(losses) == 1 and run.world_size == 1:
        return losses[0], gradient
    # A loss without weight is the mean over no target.
    pairs = [(b.weight, x) for b, x in zip(run.window, losses, strict=True) if b.weight]
    total, weight = _sum([w * x for w, x in pairs]), sum(w for w, _ in pairs)
    if run.world_size == 1:
        return total / weight, gradient
    mine = [total, weight, gradient]
    everyones = run.hook.agree(run=run, topic="guard: loss and gradient", mine=mine)
    # Several processes may share a part of the data, and so its losses.
    totals, weights, _ = zip(*everyones[:: run.world_size // run.data_size], strict=True)
    return _sum(totals) / sum(weights), _largest([found for *_, found in everyones])


def _parts_here(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return the gradients, of a sharded one the values that this process holds."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
    return [gradient for gradient in local if gradient.numel()]


def _sum(values: Sequence[float]) -> float:
    # fsum raises for infinity minus infinity; here that sum is NaN.
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def _largest(values: list[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)
