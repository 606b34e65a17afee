"""Norms, ratios and histograms, computed on the device without a device read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

EDGES = tuple(10.0**power for power in range(-12, 5))
"""Limits between the bins of the histogram; two more bins lie below and above them."""
_EXPONENTS = tuple(float(round(math.log10(edge))) for edge in EDGES)
EXPONENTS = (_EXPONENTS[0] - 1, *_EXPONENTS, _EXPONENTS[-1] + 1)
"""Edges of all bins as powers of ten; the first and the last bin are open."""


class Weights:
    """Copies of the trainable weights of some groups before the update.

    They need as much memory as those weights.
    """

    def __init__(self, groups: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self._groups = {
            name: [(p, p.detach().clone()) for p in parameters if p.requires_grad]
            for name, parameters in groups.items()
        }

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """Return three 0-d tensors by metric for every group with gradients: the norms of gradients
        and weights, and the norm of the update over that of the weights before it."""
        found: dict[str, Tensor] = {}
        for name, pairs in self._groups.items():
            grads = [p.grad for p, _ in pairs if p.grad is not None]
            if grads:
                change = norm([p - before for p, before in pairs])
                found[f"grad_norm/{name}"] = norm(grads)
                found[f"weight_norm/{name}"] = norm([p for p, _ in pairs])
                found[f"update_ratio/{name}"] = change / norm([before for _, before in pairs])
        return found

    @torch.no_grad()
    def histograms(self) -> tuple[list[str], Tensor]:
        """Return the groups with gradients, and the counts of values: (groups, bins) int64."""
        grads = {
            name: [p.grad for p, _ in pairs if p.grad is not None]
            for name, pairs in self._groups.items()
        }
        names = [name for name, found in grads.items() if found]
        return names, torch.stack([histogram(grads[name]) for name in names])


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of some tensors taken together, in float32 or better."""
    each = [
        torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32))
        for t in tensors
    ]
    total: Tensor = torch.linalg.vector_norm(torch.stack(each))
    return total


def histogram(tensors: Sequence[Tensor]) -> Tensor:
    """Return the number of absolute values in each decade, (bins,) int64.

    Zeros are in the first bin, infinity and NaN in the last. Of distributed tensors, these are the
    numbers of all processes, which all call this.
    """
    # By comparison: torch.histc is not deterministic on CUDA, and bincount makes the host wait.
    below: Any = torch.stack(
        [torch.stack([(t.abs() < edge).sum() for t in tensors]).sum() for edge in EDGES]
    )
    if hasattr(below, "full_tensor"):
        below = below.full_tensor()
    total = sum(t.numel() for t in tensors)
    first, last = below.new_zeros(1), below.new_full((1,), total)
    return torch.cat([first, below, last]).diff()
