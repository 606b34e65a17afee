"""Split micro-batches in two by rows; each part gets the weight of its own targets."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fundamentallm import Batch, train_window

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fundamentallm import Run
    from fundamentallm_guard.step_state import StepState

log = logging.getLogger("fundamentallm")


def split(window: list[Batch], times: int) -> list[Batch]:
    """Return the micro-batches of a window, each halved ``times`` times, down to single rows."""
    for _ in range(times):
        window = [part for batch in window for part in halves(batch)]
    return window


def train_again(run: Run, before: StepState) -> None:
    """Train the current window again from its start, with its micro-batches halved.

    Discards the failed attempt: an interrupted backward has added a part of its gradients. The
    window afterwards consists of the halves, with one loss each.
    """
    before.restore()
    run.forget_attempt()
    for parameter in run.parameters:
        parameter.grad = None
    if not all(map(_has_known_weights, run.window)):
        log.warning(
            "the data of the micro-batches does not show how many targets each row has: all rows"
            " get the same weight"
        )
    halved = split(run.window, 1)
    # The loop over the old window finds it empty, and ends.
    run.window.clear()
    train_window(run, halved)


def abandon(run: Run) -> None:
    """End the training of the current window, whose step will be rejected: the losses that are
    missing become NaN."""
    for parameter in run.parameters:
        parameter.grad = None
    window = list(run.window)
    run.window.clear()  # as in train_again
    unknown = torch.full((), torch.nan, device=run.device)
    run.losses += [unknown] * (len(window) - len(run.losses))
    run.window = window


def halves(batch: Batch) -> list[Batch]:
    """Split a micro-batch in two by rows; one with fewer than two rows is returned whole.

    ``data`` is a tuple or dict. The number of rows is that of its first tensor; every tensor with
    that many rows is split, and all other values go into both parts. The parts are views: nothing
    is copied. Samples, tokens and weights of the parts add up to those of the batch.
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


def _has_known_weights(batch: Batch) -> bool:
    rows = count_rows(batch)
    return rows < 2 or _weight_before(batch, rows, rows // 2) is not None


def _weight_before(batch: Batch, rows: int, middle: int) -> float | None:
    """Return the weight of the first ``middle`` rows of a micro-batch; None if it is unknown.

    If every entry of a tensor of integers is a target, or if each row is one target, all rows have
    the same weight. Otherwise the function looks for a tensor whose marks (see ``_marks``) add up
    to the batch's weight, and counts those of the rows. That reads the device.
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
    """Yield tensors that may be 1 at the targets of a batch and 0 elsewhere, the usual ones first.

    They are ``t >= 0`` for ids, because the usual ``ignore_index`` is negative, and the tensors
    themselves, which may be masks. The first column is left out in a second round: a model that
    shifts its targets itself has no target there.
    """
    for start in (0, 1):
        there = [t[:, 1:] if start else t for t in tensors if t.ndim > 1 or not start]
        yield from (t >= 0 for t in there if not t.is_floating_point() and t.dtype != torch.bool)
        yield from there
