"""An average of a model's weights, in memory of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from fundamentallm import PluginError, StorageError

Blend: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor], float], None]
Rule: TypeAlias = Callable[[int], tuple[Blend, float]]
"""Maps the count of weights in the average to ``(blend, number)``. The call
``blend(averages, weights, number)`` adds the next weights."""

IS_TRAINED = attrgetter("requires_grad")
LOW = (torch.bfloat16, torch.float16)


def equal() -> Rule:
    """Return the rule of the equal average: after n weights move by 1 / (n + 1) to the next."""
    blend = _plain(get_swa_multi_avg_fn())  # type: ignore[no-untyped-call]
    return lambda count: (blend, count)


def decaying(decay: float, *, warmup: bool) -> Rule:
    """Return the rule of the exponential average: move by 1 - ``decay`` to the next weights.

    With ``warmup`` the decay is at most (1 + n) / (10 + n) after n weights, as in TensorFlow's
    ``ExponentialMovingAverage``. The average then moves by 9 / (10 + n) = 1 / ((1 + n) / 9 + 1),
    which is the equal average's step for (1 + n) / 9 weights.
    """
    slow = _plain(get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]
    quick = _plain(get_swa_multi_avg_fn())  # type: ignore[no-untyped-call]

    def rule(count: int) -> tuple[Blend, float]:
        if warmup and (1 + count) / (10 + count) < decay:
            return quick, (1 + count) / 9
        return slow, 0

    return rule


def _plain(blend: Any) -> Blend:
    """Return a function of torch without its ``no_grad`` decorator, which costs ten Python calls a
    step. The tensors passed here have no gradients."""
    plain: Blend = inspect.unwrap(blend)
    return plain


class Average:
    """An average of the floating-point parameters of a model, on their devices.

    A parameter is averaged from the first update on at which it is trainable. Parameters in bf16
    and fp16 are averaged in float32, because rounding would lose small changes. Buffers are not
    averaged.
    """

    def __init__(self, model: nn.Module, rule: Rule) -> None:
        self.count = 0
        self._rule = rule
        self._parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
        self._waiting = dict(self._parameters)
        self._averages: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # the averaged parameters, detached
        # Averages and their parameters by device and type: one call can blend all of a group.
        self._groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        self._in_place = False

    def add(self) -> None:
        """Add the current weights to the average."""
        blend, number = self._rule(self.count)
        for averages, weights in self._groups.values():
            if weights[0].dtype in LOW:
                blend(averages, [weight.float() for weight in weights], number)
            else:
                blend(averages, weights, number)
        if self._waiting and any(map(IS_TRAINED, self._waiting.values())):
            for name in [name for name, p in self._waiting.items() if p.requires_grad]:
                self._join(name, self._waiting[name])
        self.count += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange the values of the weights and their averages in this context, and back after.

        Parameters keep their memory addresses, so compiled modules stay valid. Needs extra memory
        for the largest parameter, and for all parameters in bf16 and fp16.
        """
        if self._in_place:
            yield
            return
        self._check()
        exchanged: list[tuple[Tensor, Tensor]] = []
        self._in_place = True
        try:
            for name, average in self._averages.items():
                weight = self._weights[name]
                pair = weight, average.to(weight.dtype)
                _exchange(*pair)
                exchanged.append(pair)
            yield
        finally:
            for pair in exchanged:
                _exchange(*pair)
            self._in_place = False

    def state(self) -> dict[str, Any]:
        """Return the averages by parameter name, as the live tensors: copy before the next step."""
        self._check()
        return {"count": self.count, "weights": dict(self._averages)}

    def restore(
        self, saved: dict[str, Any], spread: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        """Continue from what ``state`` returned; raise ``StorageError`` if it does not fit.

        ``spread(average, parameter)`` divides an average among the processes as the parameter is.
        """
        for name, average in saved["weights"].items():
            parameter = self._parameters.get(name)
            if parameter is None or parameter.shape != average.shape:
                raise StorageError(f"the checkpoint contains the average of another model: {name}")
            part = average if spread is None else spread(average, parameter)
            self._join(name, parameter, part)
        self.count = saved["count"]

    def _join(self, name: str, parameter: Tensor, average: Tensor | None = None) -> None:
        weight = parameter.detach()
        dtype = torch.float32 if weight.dtype in LOW else weight.dtype
        source = weight if average is None else average
        initial = torch.empty_like(weight, dtype=dtype).copy_(source)
        averages, weights = self._groups.setdefault((weight.device, weight.dtype), ([], []))
        averages.append(initial)
        weights.append(weight)
        self._averages[name], self._weights[name] = initial, weight
        del self._waiting[name]

    def _check(self) -> None:
        """Raise ``PluginError`` if a parameter was moved: its average has missed later updates."""
        for name, weight in self._weights.items():
            if not _local(self._parameters[name]).is_set_to(_local(weight)):
                raise PluginError(
                    f"{name} can no longer be averaged: its memory was replaced during the run (for"
                    f" example by assigning to .data); change parameters in place instead"
                )


def _local(tensor: Any) -> Tensor:
    """Return the part of a distributed tensor that this process holds; of others, all."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _exchange(one: Tensor, other: Tensor) -> None:
    saved = one.clone()
    one.copy_(other)
    other.copy_(saved)
