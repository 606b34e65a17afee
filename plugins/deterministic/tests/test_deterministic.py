"""Deterministic algorithms are on for the whole run, and off again after any end."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.deterministic
from torch import Tensor, nn

from fundamentallm import PluginError, SettingsError, hookimpl, plugin
from fundamentallm.testing import PluginContract, TinyRun, assert_same_weights
from fundamentallm_deterministic import Deterministic

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class TestContract(PluginContract):
    plugin = Deterministic


def _switches() -> tuple[Any, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        os.environ.get(WORKSPACE),
    )


def _set(switches: tuple[Any, ...]) -> None:
    algorithms, warn_only, fill, benchmark, workspace = switches
    torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.backends.cudnn.benchmark = benchmark
    os.environ.pop(WORKSPACE, None)
    if workspace is not None:
        os.environ[WORKSPACE] = workspace


OFF = (False, False, True, True, None)
OTHER = (True, True, False, False, ":16:8")


@pytest.fixture(autouse=True)
def _restore_switches() -> Iterator[None]:
    before = _switches()
    _set(OFF)
    yield
    _set(before)


@plugin
class Observe:
    """Records the switches at several moments of a run."""

    def __attrs_post_init__(self) -> None:
        self.seen: dict[str, tuple[Any, ...]] = {}

    @hookimpl(wrapper=True)
    def build_data(self) -> Iterator[None]:
        self.seen["build_data"] = _switches()
        return (yield)

    @hookimpl
    def on_step_end(self) -> None:
        self.seen["step"] = _switches()

    @hookimpl
    def on_validation_end(self) -> None:
        self.seen["validation"] = _switches()


@pytest.mark.parametrize("before", [OFF, OTHER], ids=["off", "other"])
def test_the_switches_are_on_from_before_the_data_to_the_end_and_then_restored(
    tiny_run: TinyRun, before: tuple[Any, ...]
) -> None:
    _set(before)
    observe = Observe()
    tiny_run(Deterministic(), observe)
    # A variable that the user has set is kept.
    on = (True, False, True, False, before[4] or ":4096:8")
    assert observe.seen == dict.fromkeys(("build_data", "step", "validation"), on)
    assert _switches() == before


def test_the_settings_are_passed_to_torch(tiny_run: TinyRun) -> None:
    observe = Observe()
    tiny_run(Deterministic(warn_only=True, fill_uninitialized_memory=False), observe)
    assert observe.seen["step"] == (True, True, False, False, ":4096:8")


@plugin
class Fails:
    """Fails in a hook."""

    early: bool = False
    """Before anything is built, or in a step."""

    @hookimpl
    def on_run_start(self) -> None:
        if self.early:
            raise RuntimeError("something")

    @hookimpl
    def on_step_end(self) -> None:
        raise RuntimeError("something")


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("early", [True, False])
def test_the_switches_are_restored_after_a_failed_run(
    tiny_run: TinyRun, early: bool, order: int
) -> None:
    with pytest.raises(PluginError):
        tiny_run(*[Deterministic(), Fails(early=early)][::order])
    assert _switches() == OFF


@plugin
class Puts:
    """A model with an operation that has no deterministic algorithm, on a CPU either."""

    @hookimpl
    def build_model(self) -> nn.Module:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.out = nn.Linear(8, 1)

            def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                other = torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
                return (self.out(inputs) - targets).square().mean() * other[0]

        return Model()


def test_an_operation_without_a_deterministic_algorithm_ends_the_run_with_advice(
    tiny_run: TinyRun, caplog: Any
) -> None:
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        tiny_run(Puts(), Deterministic())
    assert "or allow it with deterministic.warn_only = true" in caplog.messages[-1]
    assert _switches() == OFF


def test_an_operation_without_a_deterministic_algorithm_is_a_warning_with_warn_only(
    tiny_run: TinyRun, caplog: Any
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = tiny_run(Puts(), Deterministic(warn_only=True))
    assert run.outcome == "finished"
    assert any("put_ does not have a deterministic" in str(one.message) for one in caught)
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


@plugin
class Careless:
    """Reads uninitialized memory."""

    def __attrs_post_init__(self) -> None:
        self.read: list[Tensor] = []

    @hookimpl
    def on_step_end(self) -> None:
        self.read.append(torch.empty(5))


def test_uninitialized_memory_is_nan(tiny_run: TinyRun) -> None:
    careless = Careless()
    tiny_run(careless, Deterministic())
    assert all(read.isnan().all() for read in careless.read)


def test_two_deterministic_runs_are_equal_and_equal_to_one_without_the_plugin(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    """A tiny model on a CPU is deterministic anyway, so no bit may change."""
    runs = [
        tiny_run(*parts, run_dir=tmp_path / str(index))
        for index, parts in enumerate([[Deterministic()], [Deterministic()], []])
    ]
    for run in runs[1:]:
        assert_same_weights(runs[0], run)
        assert run.history == runs[0].history


def test_one_log_line_states_what_is_not_covered(tiny_run: TinyRun, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "fundamentallm")
    tiny_run(Deterministic(warn_only=True))
    (line,) = [text for text in caplog.messages if text.startswith("deterministic: ")]
    for words in (f"{torch.get_num_threads()} CPU threads", "not covered", "atomic", "only warn"):
        assert words in line


def test_a_second_instance_is_an_error(tiny_run: TinyRun) -> None:
    again = {"again": {"plugin": "deterministic", "warn_only": True}}
    with pytest.raises(SettingsError, match="deterministic and again are all instances"):
        tiny_run("deterministic", "again", settings=again)
    assert _switches() == OFF


def test_one_instance_can_serve_two_runs(tiny_run: TinyRun, tmp_path: Path) -> None:
    one, observe = Deterministic(), Observe()
    for name in ("first", "second"):
        observe.seen.clear()
        tiny_run(one, observe, run_dir=tmp_path / name)
        assert observe.seen["step"][0] is True
        assert _switches() == OFF
