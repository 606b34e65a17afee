"""Cache keys and values, so that generating a token computes only that token."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of every layer, (B, K, capacity, D); the first ``length`` are filled.

    ``mask``, (new tokens, all tokens), is true where a new token may attend. It is None if
    ``is_causal`` is true, or if there is one new token, which attends to all.
    """

    def __init__(self, batch_size: int, capacity: int) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
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
            all_true = torch.ones(new, end, dtype=torch.bool, device=tokens.device)
            self.mask = all_true.tril(diagonal=self._start)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's keys and values, (B, K, T, D); return those of all tokens."""
        if layer not in self.layers:
            # The layer decides the size: in tensor parallelism it has a part of the K heads.
            batch_size, heads, _, width = keys.shape
            size = (batch_size, heads, self.capacity, width)
            self.layers[layer] = keys.new_zeros(size), values.new_zeros(size)
        old, new = self._start, self.length
        all_keys, all_values = self.layers[layer]
        all_keys[:, :, old:new] = keys
        all_values[:, :, old:new] = values
        return all_keys[:, :, :new], all_values[:, :, :new]
