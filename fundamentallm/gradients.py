"""The global norm of gradients."""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def total_norm(gradients: list[Any], *, alike: bool, norm_type: float = 2.0) -> Tensor:
    """Return the norm of all values together, a 0-d tensor on their device.

    The bits are those of ``torch.nn.utils.get_total_norm``. That function groups the tensors by
    device and dtype, with some twenty-five Python calls in every step; where all are ``alike``,
    this one does without. Of distributed tensors, the norm is that of all processes, which all have
    to call this.
    """
    import torch

    if gradients and hasattr(gradients[0], "full_tensor"):
        return _norm_of_all_processes(gradients, norm_type)
    if alike and gradients and norm_type == 2.0:
        try:
            norms = torch._foreach_norm(gradients)  # noqa: SLF001 - one kernel for all, on a GPU
            norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        except RuntimeError:  # sparse gradients, say
            pass
        else:
            return norm
    return torch.nn.utils.get_total_norm(gradients, norm_type)


def _norm_of_all_processes(gradients: list[Any], norm_type: float) -> Tensor:
    import torch

    first = gradients[0]
    layouts = {(gradient.device_mesh, gradient.placements) for gradient in gradients}
    if len(layouts) > 1 or not all(p.is_replicate() or p.is_shard(0) for p in first.placements):
        whole: Any = torch.nn.utils.get_total_norm(gradients, norm_type)
        return whole.full_tensor()  # type: ignore[no-any-return]
    # Torch's operations on distributed tensors cost more, and an infinity norm fails where this
    # process has no row of one of the tensors.
    parts = [part for part in (gradient.to_local() for gradient in gradients) if part.numel()]
    dtype = reduce(torch.promote_types, (gradient.dtype for gradient in gradients))
    norm = torch.nn.utils.get_total_norm(parts, norm_type).to(first.device, dtype).reshape(1)
    norms = type(first).from_local(norm, first.device_mesh, first.placements, run_check=False)
    total: Tensor = torch.linalg.vector_norm(norms.full_tensor(), norm_type)
    return total
