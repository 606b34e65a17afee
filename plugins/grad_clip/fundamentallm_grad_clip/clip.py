"""Clip gradients with the functions that ``torch.nn.utils.clip_grad_norm_`` consists of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_

if TYPE_CHECKING:
    from torch import Tensor

    from fundamentallm import Run


def clip_norm(run: Run, limit: float, norm_type: float) -> Tensor:
    """Scale the gradients so that their global norm is at most ``limit``.

    Return the norm before clipping, a 0-d tensor on the gradients' device. The factor is
    ``min(1, limit / (norm + 1e-6))``, computed on the device: Pascanu, Mikolov and Bengio, "On the
    difficulty of training recurrent neural networks" (2013, arXiv:1211.5063), algorithm 1.
    """
    norm = run.grad_norm(norm_type)  # another plugin may have computed it in this step
    clip_grads_with_norm_(run.parameters, limit, norm)
    return norm


def clip_value(run: Run, limit: float, norm_type: float) -> Tensor:
    """Limit every gradient value to ``[-limit, limit]``; return the global norm before that."""
    norm = run.grad_norm(norm_type)
    clip_grad_value_(run.parameters, limit)
    return norm
