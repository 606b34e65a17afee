"""Rotary position embeddings: Su et al., "RoFormer" (2021, arXiv:2104.09864), section 3.2."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Rotation: TypeAlias = tuple[Tensor, Tensor]
"""Cosines and sines of the angles, each (T, D / 2)."""


def rotation(length: int, width: int, theta: float) -> Rotation:
    """Return the angles of ``length`` positions for heads of ``width``: cosines and sines.

    Each is (length, width / 2). Pair i of position t rotates by ``t x theta ** (-2i / width)``. The
    angles are computed in float64, because those of float32 are inaccurate at long contexts.
    """
    pairs = torch.arange(0, width, 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), theta ** (-pairs / width))
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, angles: Rotation) -> Tensor:
    """Rotate queries or keys, (B, heads, T, D), by the angles of their T positions.

    Element i pairs with element i + D / 2, as in the Llama weights in transformers' layout. The
    paper pairs neighbours, which is the same model with its columns in another order.
    """
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.type_as(x)
