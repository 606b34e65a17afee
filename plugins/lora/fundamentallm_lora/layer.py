"""A linear layer with a low-rank adapter beside its weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

if TYPE_CHECKING:
    from fundamentallm_lora import Lora


class LoraLinear(nn.Linear):
    """A linear layer whose weight W acts as ``W + scale * lora_b @ lora_a``.

    ``lora_a``: (rank, inputs), ``lora_b``: (outputs, rank). Both are parameters of this module
    beside ``weight`` and ``bias``, which keep their names.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float
    drop: float

    @classmethod
    def adapt(cls, layer: nn.Linear, settings: Lora, generator: torch.Generator) -> None:
        """Give ``layer`` an adapter. It stays the same object: whoever holds it has it adapted.

        A is drawn as the authors' code does, uniformly within 1 / sqrt(inputs) of 0 (He et al.,
        2015, with a slope of sqrt(5)), on the CPU: the same on every device. B is 0.
        """
        weight = layer.weight
        first = torch.empty(settings.rank, layer.in_features)
        nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.lora_a = nn.Parameter(first.to(weight))
        layer.lora_b = nn.Parameter(weight.new_zeros(layer.out_features, settings.rank))
        layer.scale = settings.alpha / settings.rank
        layer.drop = settings.dropout

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as nn.Linear has it
        """Return the layer's output, (…, outputs), for ``input``, (…, inputs)."""
        into = dropout(input, self.drop, self.training) if self.drop else input
        # Scaled in between, where there is least to multiply.
        added = linear(linear(into, self.lora_a) * self.scale, self.lora_b)
        return linear(input, self.weight, self.bias) + added

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return the weight of the plain linear layer that computes the same, on the CPU.

        It is computed in float64 and rounded once, to the weight's own type.
        """
        weight, first, second = (
            part.cpu().double() for part in (self.weight, self.lora_a, self.lora_b)
        )
        return torch.addmm(weight, second, first, alpha=self.scale).to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Describe the layer, as ``print(model)`` shows it."""
        return f"{super().extra_repr()}, rank={len(self.lora_a)}, scale={self.scale:g}"
