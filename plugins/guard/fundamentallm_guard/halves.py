"""Micro-batches cut in two, so that each part is held to its own number of targets."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fundamentallm import Batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fundamentallm import Run
    from fundamentallm_guard.origin import Origin

log = logging.getLogger("fundamentallm")


def cut(window: list[Batch], times: int) -> list[Batch]:
    """Return the micro-batches of a window, each halved ``times`` times as far as it has rows."""
    for _ in range(times):
        window = [part for batch in window for part in halves(batch)]
    return window


def redo(run: Run, origin: Origin) -> None:
    """Train the window at hand once more from its beginning, with its micro-batches halved.

    What the failed attempt left is void: a backward that broke off has added a part of its
    gradients. In the end the window is one of the halves, with a loss for each.
    """
    origin.put_back()
    run.forget_attempt()
    for parameter in run.parameters:
        parameter.grad = None
    if not all(map(_tells_weights, run.window)):
        log.warning(
            "the weights of halved micro-batches cannot be told from their data: all rows"
            " are taken to weigh the same"
        )
    halved = [part for part in cut(run.window, 1) if part.weight]
    # Whoever goes over the old window finds nothing left in it to do.
    run.window.clear()
    run.window, run.losses = halved, []
    total, last = run.hook.weigh_window(run=run, window=halved), halved[-1]
    for batch in halved:
        run.weight = batch.weight
        share = batch.weight / total
        run.hook.train_microbatch(run=run, batch=batch, share=share, is_last=batch is last)


def abandon(run: Run) -> None:
    """Leave the window at hand as it is: it will be rejected."""
    for parameter in run.parameters:
        parameter.grad = None
    window = list(run.window)
    run.window.clear()  # as above
    unknown = torch.full((), torch.nan, device=run.device)
    run.losses += [unknown] * (len(window) - len(run.losses))
    run.window = window


def halves(batch: Batch) -> list[Batch]:
    """Cut a micro-batch in two along its rows; one of fewer than two rows stays as it is.

    ``data`` is a tuple or dict. Its rows are those of its first tensor; every tensor with as many
    is cut, and all else goes into both parts. The parts are views: nothing is copied. Samples,
    tokens and weight of the parts add up to the batch's.
    """
    rows = count_rows(batch)
    if rows < 2:
        return [batch]
    middle = rows // 2
    weight = _weight_before(batch, rows, middle)
    weight = batch.weight * middle / rows if weight is None else weight
    samples, tokens = batch.samples * middle // rows, batch.tokens * middle // rows
    head = Batch(_rows(batch.data, rows, slice(0, middle)), weight, samples, tokens, batch.first)
    tail = Batch(
        _rows(batch.data, rows, slice(middle, rows)),
        batch.weight - weight,
        batch.samples - samples,
        batch.tokens - tokens,
        batch.first + samples,
    )
    return [head, tail]


def count_rows(batch: Batch) -> int:
    """Return the size of the first dimension of a micro-batch's first tensor; 0 without one."""
    found = [tensor for tensor in _values(batch.data) if tensor.ndim]
    return found[0].shape[0] if found else 0


def _values(data: Any) -> list[Tensor]:
    values = data.values() if isinstance(data, dict) else data
    found = values if isinstance(values, tuple | list) else list(values)
    return [value for value in found if isinstance(value, Tensor)]


def _rows(data: Any, rows: int, which: slice) -> Any:
    def part(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.ndim and value.shape[0] == rows
        return value[which] if fits else value

    if isinstance(data, dict):
        return {name: part(value) for name, value in data.items()}
    return tuple(part(value) for value in data)


def _tells_weights(batch: Batch) -> bool:
    rows = count_rows(batch)
    return rows < 2 or _weight_before(batch, rows, rows // 2) is not None


def _weight_before(batch: Batch, rows: int, middle: int) -> float | None:
    """Return how much of a micro-batch's weight is in its first ``middle`` rows; None if that
    cannot be told.

    Where every entry of a tensor of integers is a target, or where there is no such tensor and one
    target a row, all rows weigh the same. Otherwise rows weigh what they hold of whatever there is
    as much of in the whole batch as its weight says. To count that, the host waits for the device.
    """
    tensors = [t for t in _values(batch.data) if t.ndim and t.shape[0] == rows]
    tokens = [t for t in tensors if t.ndim > 1 and not t.is_floating_point()]
    if batch.weight in ([t.numel() for t in tokens] or [rows]):
        return batch.weight * middle / rows
    for marked in _marks(tensors):
        ones = ((marked == 0) | (marked == 1)).all()
        counts = marked.reshape(rows, -1).sum(1)
        found = [counts[:middle].sum(), counts.sum(), ones.to(counts.dtype)]
        before, total, is_mask = torch.stack(found).tolist()
        if is_mask and total == batch.weight:
            return float(before)
    return None


def _marks(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Yield what may mark the targets of a batch with 1 and all else with 0, the usual first.

    Ids of targets are not negative where there is one, as the usual ``ignore_index`` is; or there
    is a mask. A model that shifts its targets by itself has none for the first of a row.
    """
    for start in (0, 1):
        there = [t[:, 1:] if start else t for t in tensors if t.ndim > 1 or not start]
        yield from (t >= 0 for t in there if not t.is_floating_point() and t.dtype != torch.bool)
        yield from there
