"""Clipping, from the pieces that ``torch.nn.utils.clip_grad_norm_`` is made of.

That function does the same in a few more Python calls, which every step would pay for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

if TYPE_CHECKING:
    from torch import Tensor, nn


def clip_norm(parameters: list[nn.Parameter], limit: float, norm_type: float) -> Tensor:
    """Scale the gradients so that their global norm is at most ``limit``.

    Return the norm before that, a 0-d tensor on the gradients' device. The factor is
    ``min(1, limit / (norm + 1e-6))``, computed on the device, as in Pascanu, Mikolov and Bengio,
    "On the difficulty of training recurrent neural networks" (2013), algorithm 1.
    """
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None], norm_type)
    clip_grads_with_norm_(parameters, limit, norm)
    return norm


def clip_value(parameters: list[nn.Parameter], limit: float, norm_type: float) -> Tensor:
    """Cut every gradient value to ``[-limit, limit]``; return the global norm before that."""
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None], norm_type)
    clip_grad_value_(parameters, limit)
    return norm
