"""Cache keys and values, so that generating a token computes only that token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fundamentallm_gpt.shapes import Shape


class KeyValueCache:
    """Keys and values of every layer, (L, B, K, capacity, D); the first ``length`` are filled.

    ``mask``, (new tokens, all tokens), is true where a new token may attend. It is None if
    ``is_causal`` is true, or if there is one new token, which attends to all.
    """

    def __init__(self, shape: Shape, batch_size: int, capacity: int, *, like: Tensor) -> None:
        size = (shape.num_layers, batch_size, shape.num_kv_heads, capacity, shape.head_width)
        self.keys = like.new_zeros(size)
        self.values = like.new_zeros(size)
        self.batch_size = batch_size
        self.capacity = capacity
        self.length = 0
        self.mask: Tensor | None = None
        self.is_causal = True
        self._start = 0

    def extend(self, tokens: Tensor) -> None:
        """Extend the cache for ``tokens``, (B, T); every layer then appends its keys and values.

        Raises ``ValueError`` if they do not fit.
        """
        batch_size, new = tokens.shape
        end = self.length + new
        if batch_size != self.batch_size or end > self.capacity:
            raise ValueError(
                f"a cache for {self.batch_size} sequences of {self.capacity} tokens cannot "
                f"contain {batch_size} sequences of {end}"
            )
        self._start, self.length = self.length, end
        self.is_causal = self._start == 0
        self.mask = None
        if self._start and new > 1:
            # is_causal would align the mask with the first token, not with the last.
            all_true = torch.ones(new, end, dtype=torch.bool, device=self.keys.device)
            self.mask = all_true.tril(diagonal=self._start)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's keys and values, (B, K, T, D); return those of all tokens."""
        old, new = self._start, self.length
        self.keys[layer, :, :, old:new] = keys
        self.values[layer, :, :, old:new] = values
        return self.keys[layer, :, :, :new], self.values[layer, :, :, :new]
