"""Linear layers with a low-rank adapter: ``nn.Linear``, and ``Conv1D`` of transformers' GPT-2."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

if TYPE_CHECKING:
    from fundamentallm_lora import Lora


class LoraLayer(nn.Module):
    """A linear layer whose weight W acts as ``W + scale * lora_b @ lora_a``.

    ``lora_a``: (rank, inputs), ``lora_b``: (outputs, rank). Both are parameters of the layer, next
    to ``weight`` and ``bias``, which keep their names. Hu et al., "LoRA: Low-Rank Adaptation of
    Large Language Models" (2021, arXiv:2106.09685), section 4.1.
    """

    weight: Tensor
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float
    drop: float
    transposed: ClassVar[bool] = False
    """Whether ``weight`` is (inputs, outputs) and not (outputs, inputs)."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear has
        """Return the layer's output, (…, outputs), for ``input``, (…, inputs)."""
        dropped = dropout(input, self.drop, self.training) if self.drop else input
        # Scaled between the two products, where the tensor is smallest.
        added = linear(linear(dropped, self.lora_a) * self.scale, self.lora_b)
        output: Tensor = super().forward(input)
        return output + added

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return the weight of the plain layer that computes the same, on the CPU.

        It is computed in float64 and rounded once, to the weight's own type.
        """
        weight, a, b = (p.cpu().double() for p in (self.weight, self.lora_a, self.lora_b))
        first, second = (a.T, b.T) if self.transposed else (b, a)
        return torch.addmm(weight, first, second, alpha=self.scale).to(self.weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the weight in place, and make this the plain layer again."""
        self.weight.copy_(self.merged_weight())
        del self.lora_a, self.lora_b, self.scale, self.drop
        self.__class__ = type(self).__bases__[1]

    def extra_repr(self) -> str:
        """Return the settings of the layer, as ``print(model)`` shows them."""
        return f"{super().extra_repr()}, rank={len(self.lora_a)}, scale={self.scale:g}"


class LoraLinear(LoraLayer, nn.Linear):
    """An ``nn.Linear`` with an adapter."""


def can_adapt(module: nn.Module) -> bool:
    """Return whether a module is exactly an ``nn.Linear``, or transformers' ``Conv1D``."""
    return type(module) is nn.Linear or _is_conv1d(module)


def add_adapter(layer: nn.Module, settings: Lora, generator: torch.Generator) -> None:
    """Give a layer an adapter. The layer stays the same object, so all references are adapted.

    A is drawn as in the authors' code, uniformly within 1 / sqrt(inputs) of 0 (He et al., 2015,
    arXiv:1502.01852, with a slope of sqrt(5)). It is drawn on the CPU, to be equal on every device.
    B is 0.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    adapted = _adapted_class(type(layer))
    inputs, outputs = weight.shape if adapted.transposed else reversed(weight.shape)
    first = torch.empty(settings.rank, inputs)
    nn.init.kaiming_uniform_(first, a=math.sqrt(5), generator=generator)
    layer.__class__ = adapted
    assert isinstance(layer, LoraLayer)
    layer.lora_a = nn.Parameter(first.to(weight))
    layer.lora_b = nn.Parameter(weight.new_zeros(outputs, settings.rank))
    layer.scale = settings.alpha / settings.rank
    layer.drop = settings.dropout


_adapted_classes: dict[type[nn.Module], type[LoraLayer]] = {nn.Linear: LoraLinear}


def _adapted_class(cls: type[nn.Module]) -> type[LoraLayer]:
    if cls not in _adapted_classes:
        # A subclass of the layer's own class, whose forward it needs. That class belongs to
        # transformers, which is no dependency, so the subclass is made at run time.
        body = {"transposed": True, "__doc__": f"A {cls.__name__} with an adapter."}
        _adapted_classes[cls] = type(f"Lora{cls.__name__}", (LoraLayer, cls), body)
    return _adapted_classes[cls]


def _is_conv1d(module: nn.Module) -> bool:
    # By name and shape, since transformers may not be installed. Its Conv1D is a linear layer with
    # the weight (inputs, outputs) and the number of outputs as nf.
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D"
        and isinstance(weight, nn.Parameter)
        and weight.ndim == 2
        and getattr(module, "nf", None) == weight.shape[1]
    )
