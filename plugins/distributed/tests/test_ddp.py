"""A run of several processes is the run of one: the same weights, metrics and files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fundamentallm import Batch, Data, Progress, Run, field, hookimpl, plugin
from fundamentallm.testing import PluginContract, Trained, TwoProcesses
from fundamentallm_distributed import Ddp

GPT = {"gpt": {"num_layers": 2, "d_model": 32, "num_heads": 4}}
STEPS = 30


class TestContract(PluginContract):
    plugin = Ddp
    wrong_settings = (
        ({"timeout": 0}, "ddp.timeout: must be > 0"),
        ({"bucket_mb": -1.0}, "ddp.bucket_mb: must be > 0"),
        ({"buffers": "all"}, 'ddp.buffers: unknown value "all"'),
    )


@plugin
class Ragged:
    """Sequences of 16 tokens of which the first k are targets, k from 0 to 16."""

    batch_size: int = 8
    states_total: bool = True
    """Whether a batch states its weight over all processes."""
    only_first: bool = False
    """Whether the rows of every third step that are not the first process's have no target."""

    vocab_size = 32
    context_length = 16
    epoch_samples = 64
    fingerprint = "ragged"
    _part: tuple[int, int] = field(init=False, default=(0, 1))

    @hookimpl
    def build_data(self, run: Run) -> Data:
        torch.set_default_dtype(torch.float64)
        self._part = run.data_rank, run.data_size
        return self

    def batches(self, progress: Progress) -> Iterator[Batch]:
        first = progress.samples
        while True:
            yield self.batch(range(first, first + self.batch_size))
            first += self.batch_size

    def validation(self) -> Mapping[str, list[Batch]]:
        # The last micro-batch has one row, so all processes but one have none.
        return {"val": [self.batch(range(a, b)) for a, b in ((100, 108), (108, 116), (116, 117))]}

    def batch(self, indices: range) -> Batch:
        rank, size = self._part
        count = len(indices)
        ours = indices[count * rank // size : count * (rank + 1) // size]
        everyones = [self.targets(i, indices) for i in indices]
        total = float(sum(int((row >= 0).sum()) for row in everyones))
        rows = ours or indices[:1]
        inputs = torch.stack([self.inputs(i) for i in rows])
        targets = torch.stack([self.targets(i, indices) for i in rows])
        weight = float((targets >= 0).sum()) if ours else 0.0
        stated = total if self.states_total else None
        return Batch((inputs, targets), weight, count, 16 * count, rows[0], stated)

    def inputs(self, index: int) -> torch.Tensor:
        return (torch.arange(16) * (index % 7 + 1) + index) % 32

    def targets(self, index: int, indices: range) -> torch.Tensor:
        targets = (torch.arange(16) * (index % 5 + 2) + 3 * index) % 32
        targets[index * 5 % 17 :] = -100
        if self.only_first and index - indices[0] >= 4 and (indices[0] // 8) % 3 == 0:
            targets[:] = -100
        return targets


def settings(**tables: Any) -> dict[str, Any]:
    return GPT | {"run": {"validate_every": 10, "log_every": 5}} | tables


def furthest(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def assert_same_metrics(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    assert [sorted(row) for row in one] == [sorted(row) for row in other]
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12, abs=0)


@pytest.fixture
def ragged(two_processes: TwoProcesses, tmp_path: Path) -> Any:
    """Train on ragged data in some number of processes."""

    def train(processes: int, *plugins: Any, run_dir: str = "run", **more: Any) -> list[Trained]:
        listed = ["gpt", *plugins]
        if "optimizer" not in more:
            listed += ["adamw", "grad_clip"]
        return two_processes(
            *listed,
            processes=processes,
            settings=settings(grad_clip={"max_norm": 0.5}, **more.pop("tables", {})),
            run_dir=tmp_path / run_dir / str(processes),
            length=more.pop("length", STEPS),
        )

    return train


@pytest.mark.parametrize("states_total", [True, False])
def test_any_number_of_processes_ends_with_the_weights_and_metrics_of_one(
    ragged: Any, states_total: bool
) -> None:
    (alone,) = ragged(1, Ragged(states_total=states_total))
    for processes in (2, 3, 4):
        trained = ragged(processes, Ragged(states_total=states_total))
        for one in trained:
            assert furthest(one.weights, alone.weights) <= 1e-14
            assert_same_metrics(one.history, alone.history)


def test_a_process_without_a_target_takes_part(ragged: Any) -> None:
    (alone,), two = ragged(1, Ragged(only_first=True)), ragged(2, Ragged(only_first=True))
    assert furthest(two[0].weights, alone.weights) <= 1e-14
    assert_same_metrics(two[1].history, alone.history)
