"""Ragged data, to compare a run of several processes with a run of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from fundamentallm import Batch, Data, Progress, Run, field, hookimpl, plugin

GPT = {"gpt": {"num_layers": 1, "d_model": 16, "num_heads": 2}}
LENGTH = 16  # tokens of a row


@plugin
class Ragged:
    """Rows of 16 tokens of which the first k are targets, k from 0 to 16.

    The processes share each batch; the last held-out batch has one row, so all processes but one
    have none of it.
    """

    batch_size: int = 8
    dtype: str = "float64"
    states_total: bool = True
    """Whether a batch states its weight over all processes."""
    only_first: bool = False
    """Whether the rows of every third step that are not the first process's have no target."""

    vocab_size = 32
    context_length = LENGTH
    epoch_samples = 64
    fingerprint = "ragged"
    _part: tuple[int, int] = field(init=False, default=(0, 1))

    @hookimpl
    def build_data(self, run: Run) -> Data:
        torch.set_default_dtype(getattr(torch, self.dtype))
        self._part = run.data_rank, run.data_size
        return self

    def bytes_per_token(self, split: str) -> float:
        return 3.7

    def batches(self, progress: Progress) -> Iterator[Batch]:
        first = progress.samples
        while True:
            yield self.batch(range(first, first + self.batch_size))
            first += self.batch_size

    def validation(self) -> Mapping[str, list[Batch]]:
        return {"val": [self.batch(range(a, b)) for a, b in ((100, 108), (108, 116), (116, 117))]}

    def batch(self, indices: range) -> Batch:
        rank, size = self._part
        count = len(indices)
        ours = indices[count * rank // size : count * (rank + 1) // size]
        total = float(sum(int((self.targets(i, indices) >= 0).sum()) for i in indices))
        rows = ours or indices[:1]
        inputs = torch.stack([inputs_of(i) for i in rows])
        targets = torch.stack([self.targets(i, indices) for i in rows])
        weight = float((targets >= 0).sum()) if ours else 0.0
        stated = total if self.states_total else None
        return Batch((inputs, targets), weight, count, LENGTH * count, rows[0], stated)

    def targets(self, index: int, indices: range) -> torch.Tensor:
        targets = targets_of(index)
        if self.only_first and index - indices[0] >= 4 and (indices[0] // 8) % 3 == 0:
            targets[:] = -100
        return targets


def inputs_of(index: int) -> torch.Tensor:
    return (torch.arange(LENGTH) * (index % 7 + 1) + index) % 32


def targets_of(index: int) -> torch.Tensor:
    targets = (torch.arange(LENGTH) * (index % 5 + 2) + 3 * index) % 32
    targets[index * 5 % 17 :] = -100
    return targets


def furthest(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Return the largest difference of a weight."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def assert_same_rows(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    """Fail unless two histories have the same metrics, within 1e-12."""
    for mine, theirs in zip(one, other, strict=True):
        assert not mine.keys() ^ theirs.keys(), f"step {mine['step']:.0f}"
        differing = {
            name: (value, theirs[name])
            for name, value in mine.items()
            if value != pytest.approx(theirs[name], rel=1e-12, abs=0, nan_ok=True)
        }
        assert not differing, f"step {mine['step']:.0f}: {differing}"


def bits(values: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the bytes of weights."""
    return {name: tensor.numpy().tobytes() for name, tensor in values.items()}
