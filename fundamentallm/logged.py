"""What was logged since the last row of metrics: values and weights, by name."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any, TypeAlias, cast

if TYPE_CHECKING:
    from torch import Tensor

NUMBER = (float, int)  # making a union of types takes longer than asking it
# Value, weight, and `progress.step` before the attempt that logged it; None between attempts.
Entry: TypeAlias = tuple[Any, float, int | None]
Logged: TypeAlias = defaultdict[str, list[Entry]]


def settle(logged: Logged) -> Logged:
    """Turn the tensors among the values into plain numbers, in place: one device read."""
    entries = [entry for rows in logged.values() for entry in rows]
    tensors = [value for value, _, _ in entries if not isinstance(value, float | int)]
    if tensors:
        numbers = iter(_to_floats(tensors))
        for name, rows in logged.items():
            logged[name] = [
                (v if isinstance(v, float | int) else next(numbers), w, s) for v, w, s in rows
            ]
    return logged


def sums(entries: list[Entry]) -> tuple[float, float]:
    """Return the sum of the weighted values, and that of the weights."""
    # Lists: a generator would be called once for every step of the period. A value without weight
    # may be NaN: the mean over no target.
    values = math.fsum([value * weight for value, weight, _ in entries if weight])
    return values, math.fsum([weight for _, weight, _ in entries])


def _to_floats(tensors: list[Tensor]) -> list[float]:
    import torch

    if len({tensor.device for tensor in tensors}) > 1:
        tensors = [tensor.cpu() for tensor in tensors]
    return cast("list[float]", torch.stack(tensors).tolist())
