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
    dtype: str = "float64"
    only_first: bool = False
    """Whether the rows of every third step that are not the first process's have no target."""

    vocab_size = 32
    context_length = 16
    epoch_samples = 64
    fingerprint = "ragged"
    _part: tuple[int, int] = field(init=False, default=(0, 1))

    @hookimpl
    def build_data(self, run: Run) -> Data:
        torch.set_default_dtype(getattr(torch, self.dtype))
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


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_two_processes_have_the_bits_of_one_that_accumulates_two_micro_batches(
    ragged: Any, optimizer: str, dtype: str
) -> None:
    tables: dict[str, Any] = {"sgd": {"lr": 0.1}} if optimizer == "sgd" else {}
    half, full = Ragged(batch_size=4, dtype=dtype), Ragged(dtype=dtype)
    listed, more = (optimizer, "grad_clip"), {"optimizer": None}
    both = tables | {"accumulate": {"microbatches": 2}}
    (alone,) = ragged(1, half, *listed, "accumulate", tables=both, **more)
    for trained in ragged(2, full, *listed, tables=tables, **more):
        assert all(trained.weights[name].equal(alone.weights[name]) for name in alone.weights)


def test_single_precision_differs_by_rounding_alone(ragged: Any) -> None:
    (alone,) = ragged(1, Ragged(dtype="float32"))
    for trained in ragged(2, Ragged(dtype="float32")):
        assert furthest(trained.weights, alone.weights) <= 1e-6


def test_the_same_run_twice_has_the_same_bits(ragged: Any) -> None:
    one, other = ragged(3, Ragged(), run_dir="a"), ragged(3, Ragged(), run_dir="b")
    for mine, theirs in zip(one, other, strict=True):
        assert all(mine.weights[name].equal(theirs.weights[name]) for name in mine.weights)
        assert mine.history == theirs.history


@plugin
class Normalized:
    """A network with a batch normalization, whose running means are buffers."""

    @hookimpl
    def build_model(self) -> torch.nn.Module:
        from torch import nn

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

            def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
                return nn.functional.mse_loss(self.layers(inputs), targets)

        return Net()


@pytest.mark.parametrize("buffers", ["first", "own"])
def test_a_validation_uses_the_buffers_of_the_first_process_or_each_its_own(
    two_processes: TwoProcesses, buffers: str
) -> None:
    tables = {"ddp": {"timeout": 20, "buffers": buffers}}
    first, second = two_processes(Normalized(), settings=tables, length=4)
    name = "layers.1.running_mean"
    assert bool(first.weights[name].equal(second.weights[name])) is (buffers == "first")
    assert first.weights["layers.0.weight"].equal(second.weights["layers.0.weight"])


def test_a_model_that_does_not_use_all_parameters_needs_find_unused(
    two_processes: TwoProcesses,
) -> None:
    @plugin
    class Unused:
        @hookimpl
        def build_model(self) -> torch.nn.Module:
            model = Normalized().build_model()
            model.register_parameter("unused", torch.nn.Parameter(torch.zeros(2)))
            return model

    tables = {"ddp": {"timeout": 20, "find_unused": True}}
    for trained in two_processes(Unused(), settings=tables, length=4):
        assert trained.outcome == "finished"
    for trained in two_processes(Unused(), length=4):
        assert trained.error is not None
        assert "find_unused" in str(trained.error)


def test_processes_that_were_started_with_other_settings_are_an_error(tmp_path: Path) -> None:
    from fundamentallm import SettingsError, train
    from fundamentallm.testing import compose_tiny, in_processes

    def work(rank: int) -> str:
        with pytest.raises(SettingsError) as raised:
            train(compose_tiny("ddp", seed=rank), run_dir=tmp_path / "run")
        return str(raised.value)

    for text in in_processes(2, work):
        assert "process 1 was started with settings other than those of process 0" in text


def test_srun_starts_processes_without_torchrun() -> None:
    from fundamentallm_distributed.start import first_host, slurm_variables

    variables = {
        "SLURM_JOB_ID": "4711",
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[07-09,12],login1",
    }
    assert slurm_variables(variables) == {
        "RANK": "5",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "24711",
    }
    for nodes, host in (("n1", "n1"), ("a-[3,5]-x,b", "a-3-x"), ("n1,n2", "n1")):
        assert first_host(nodes) == host
