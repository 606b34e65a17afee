"""A run of several processes is the run of one: the same weights, metrics and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ragged import Ragged, assert_same_rows, furthest

from fundamentallm import hookimpl, plugin
from fundamentallm.testing import PluginContract, TwoProcesses
from fundamentallm_distributed import Ddp


class TestContract(PluginContract):
    plugin = Ddp
    wrong_settings = (
        ({"timeout": 0}, "ddp.timeout: must be > 0"),
        ({"bucket_mb": -1.0}, "ddp.bucket_mb: must be > 0"),
        ({"buffers": "all"}, 'ddp.buffers: unknown value "all"'),
    )


@pytest.mark.parametrize("states_total", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_any_number_of_processes_ends_with_the_weights_and_metrics_of_one(
    ragged: Any, states_total: bool
) -> None:
    (alone,) = ragged(1, Ragged(states_total=states_total))
    for processes in (2, 3, 4):
        trained = ragged(processes, Ragged(states_total=states_total))
        for one in trained:
            assert furthest(one.weights, alone.weights) <= 1e-14
            assert_same_rows(one.history, alone.history)


def test_a_process_without_a_target_takes_part(ragged: Any) -> None:
    (alone,), two = ragged(1, Ragged(only_first=True)), ragged(2, Ragged(only_first=True))
    assert furthest(two[0].weights, alone.weights) <= 1e-14
    assert_same_rows(two[1].history, alone.history)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
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


def test_the_model_of_a_finished_run_is_not_wrapped(tmp_path: Path) -> None:
    from fundamentallm import train
    from fundamentallm.testing import compose_tiny, in_processes

    def work(_: int) -> bool:
        run = train(compose_tiny("ddp"), run_dir=tmp_path / "run")
        return run.module is run.model

    assert in_processes(2, work) == [True, True]
