"""The global norm of gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def total_norm(gradients: list[Tensor], *, alike: bool) -> Tensor:
    """Return the 2-norm of all values together, a 0-d tensor on their device.

    The bits are those of ``torch.nn.utils.get_total_norm``. That function groups the tensors by
    device and dtype, with some twenty-five Python calls in every step; where all are ``alike``,
    this one does without.
    """
    import torch

    if alike and gradients:
        try:
            norms = torch._foreach_norm(gradients)  # noqa: SLF001 - one kernel for all, on a GPU
            norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        except RuntimeError:  # sparse gradients, say
            pass
        else:
            return norm
    return torch.nn.utils.get_total_norm(gradients)
