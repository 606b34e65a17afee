"""What a schedule does in a run, what it is counted in, and which settings it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from python_calls import python_calls

from fundamentallm import (
    Batch,
    Period,
    Progress,
    Rejection,
    Run,
    RunSettings,
    SettingsError,
    hookimpl,
    plugin,
)
from fundamentallm.testing import PluginContract, TinyRun
from fundamentallm_lr_schedule import LrSchedule


class TestContract(PluginContract):
    plugin = LrSchedule
    wrong_settings = (
        ({"shape": "cosin"}, "shape: unknown value \"cosin\" (did you mean 'cosine'?)"),
        ({"shape": "wsd"}, "decay: is missing; shape 'wsd' needs it"),
        ({"shape": "cosine_with_restarts"}, "cycle: is missing"),
        ({"shape": "polynomial"}, "power: is missing"),
        ({"shape": "one_cycle"}, "warmup: is missing"),
        ({"shape": "inverse_sqrt"}, "warmup: is missing"),
        ({"shape": "cosine", "decay": 0.1}, "decay: belongs to shape 'wsd', but shape is 'cosine'"),
        ({"shape": "wsd", "decay": 0.1, "power": 2.0}, "power: belongs to shape 'polynomial'"),
        ({"start": 0.1}, "start: belongs to shape 'one_cycle'"),
        ({"warmup": 1.5}, "warmup: a fraction of the run is more than 0 and at most 1, got 1.5"),
        ({"warmup": 100.0}, "for a number of steps write it without a point"),
        ({"length": 0.0}, "length: a fraction"),
        ({"warmup": -0.1}, "warmup: a fraction"),
        ({"warmup": "10 stepz"}, "warmup: "),
        ({"decay_to": 1.1}, "decay_to: must be <= 1"),
        (
            {"shape": "cosine_with_restarts", "cycle": 0.1, "cycle_growth": 0.5},
            "cycle_growth: must",
        ),
    )


def rates(run: Run) -> list[float]:
    return [row["optim/lr"] for row in run.history]


def test_the_optimizers_learning_rate_follows_the_schedule(tiny_run: TinyRun) -> None:
    run = tiny_run(LrSchedule(shape="linear", warmup=Period(2)), length=6, log_every=1)
    assert rates(run) == [0.01 * f for f in (1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25)]


def test_rejected_steps_do_not_advance_the_schedule(tiny_run: TinyRun) -> None:
    @plugin
    class RejectSecond:
        """Rejects every second step."""

        @hookimpl
        def judge_step(self, run: Run) -> Rejection | None:
            return Rejection("other", "every second one") if run.progress.step % 2 else None

    run = tiny_run(RejectSecond(), LrSchedule(shape="linear"), length=8, log_every=1)
    expected = [f for f in (1.0, 0.875, 0.75, 0.625) for _ in range(2)]
    assert rates(run) == [0.01 * f for f in expected]


def test_a_resumed_run_continues_the_schedule(tiny_run: TinyRun, tmp_path: Path) -> None:
    @plugin
    class Resume:
        """Keeps a copy of the run's state after step 3, or begins with one."""

        def __init__(self, begin: dict[str, Any] | None = None) -> None:
            self.begin = begin

        @hookimpl
        def read_checkpoint(self) -> dict[str, Any] | None:
            return self.begin

        @hookimpl
        def on_safe_point(self, run: Run) -> None:
            if run.progress.step == 3:
                self.kept = copy.deepcopy(run.snapshot())

    def run(resume: Any) -> Run:
        schedule = LrSchedule(warmup=Period(5), decay_to=0.1)
        folder = tmp_path / str(resume.begin is None)
        return tiny_run(schedule, resume, length=12, log_every=1, run_dir=folder)

    whole = Resume()
    uninterrupted = run(whole)
    assert rates(run(Resume(begin=whole.kept))) == rates(uninterrupted)[3:]


def test_two_schedules_multiply_in_any_order(tiny_run: TinyRun, tmp_path: Path) -> None:
    tables = {
        "rise": {"plugin": "lr_schedule", "shape": "constant", "warmup": 3},
        "fall": {"plugin": "lr_schedule", "shape": "linear"},
    }
    one = tiny_run("rise", "fall", settings=tables, log_every=1, run_dir=tmp_path / "one")
    other = tiny_run("fall", "rise", settings=tables, log_every=1, run_dir=tmp_path / "other")
    expected = [0.25 * 1, 0.5 * 0.75, 0.75 * 0.5, 1 * 0.25]
    assert rates(one) == rates(other) == [0.01 * f for f in expected]


def test_a_step_makes_three_python_calls(tiny_run: TinyRun) -> None:
    schedule = LrSchedule(warmup=Period(2), decay_to=0.1)
    run = tiny_run(schedule, length=10)
    for applied in (0, 5):
        run.progress = Progress(applied=applied)
        assert python_calls(lambda: schedule.lr_factor(run)) - python_calls(lambda: None) == 3


def factor(run_length: str, progress: Progress, **table: Any) -> float:
    run = Run(RunSettings(length=Period.parse(run_length)), {}, Path())
    schedule = LrSchedule(**table)
    run.plugins = {"lr_schedule": schedule}
    run.progress = progress
    schedule.on_run_start(run)
    return schedule.lr_factor(run)


def test_lengths_in_tokens_count_tokens() -> None:
    half = Progress(step=7, applied=7, tokens=500_000)
    assert factor("1e6 tokens", half, shape="linear") == 0.5
    assert factor("1e6 tokens", half, shape="constant", warmup=Period(1e6, "tokens")) == 0.5
    assert factor("1e6 tokens", half, shape="inverse_sqrt", warmup=0.125) == 0.5


def test_lengths_in_epochs_count_samples() -> None:
    at = Progress(step=7, applied=7, samples=250, epoch_samples=100)
    assert factor("10 epochs", at, shape="linear") == 0.75


def test_lengths_in_units_of_time_count_time() -> None:
    at = Progress(step=7, applied=7, seconds=1800.0)
    assert factor("1 hour", at, shape="linear") == 0.5
    assert factor("1 hour", at, shape="linear", length=Period(120, "minutes")) == 0.75


def test_lengths_may_all_be_in_another_unit_than_the_runs() -> None:
    at = Progress(step=7, applied=5, seconds=1800.0)
    table = {"warmup": Period(2), "length": Period(8)}
    assert factor("1 hour", at, shape="linear", **table) == 0.5


def test_the_final_learning_rate_stays_when_the_run_is_longer() -> None:
    at = Progress(applied=900)
    assert factor("1000 steps", at, shape="cosine", length=Period(500), decay_to=0.1) == 0.1


def test_a_run_in_epochs_follows_its_schedule_to_the_end(tiny_run: TinyRun) -> None:
    run = tiny_run(LrSchedule(shape="linear"), length="2 epochs", log_every=1)
    assert rates(run) == [0.01 * (1 - i / 8) for i in range(8)]


def test_lengths_in_epochs_are_an_error_if_the_data_has_no_epochs(tiny_run: TinyRun) -> None:
    class Endless:
        epoch_samples = None
        fingerprint = "endless"

        def batches(self, _: Progress) -> Any:
            import torch

            while True:
                yield Batch((torch.ones(4, 8), torch.ones(4, 1)), 4, 4, 4)

        def validation(self) -> dict[str, list[Batch]]:
            return {}

    @plugin
    class EndlessData:
        """A source without epochs."""

        @hookimpl
        def build_data(self) -> Any:
            return Endless()

    schedule = LrSchedule(shape="constant", warmup=Period(1, "epochs"))
    with pytest.raises(
        SettingsError, match="its lengths are in epochs, but the data source has no"
    ):
        tiny_run(EndlessData(), schedule)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"warmup": Period(1e6, "tokens")}, "lr_schedule.warmup: is in tokens, but length is in"),
        ({"length": Period(1, "hours")}, None),
        ({"length": Period(1, "hours"), "warmup": 0.1}, "warmup: is in steps, but length is in"),
        ({"shape": "constant", "warmup": Period(1e6, "tokens")}, None),
        ({"warmup": Period(100)}, "warmup: takes the whole schedule (100 of 100 steps)"),
        ({"shape": "constant", "warmup": Period(100)}, None),
        ({"shape": "wsd", "warmup": 0.5, "decay": 0.6}, "decay: begins before the warmup ends"),
        ({"shape": "wsd", "warmup": 0.7, "decay": 0.3}, None),
        ({"shape": "one_cycle", "warmup": Period(1)}, None),
    ],
)
def test_lengths_that_do_not_fit_together_are_reported_at_the_start(
    table: dict[str, Any], complaint: str | None
) -> None:
    if complaint is None:
        assert 0 <= factor("100 steps", Progress(), **table) <= 1
        return
    with pytest.raises(SettingsError) as caught:
        factor("100 steps", Progress(), **table)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("warmup", [0, 0.0, 5, "5 steps", 0.5])
def test_a_length_is_a_period_or_a_fraction(warmup: Any, tiny_run: TinyRun) -> None:
    table = {"lr_schedule": {"shape": "constant", "warmup": warmup}}
    run = tiny_run("lr_schedule", settings=table, length=10, log_every=1)
    expected = [0.01 * min((i + 1) / 6, 1) for i in range(10)] if warmup else [0.01] * 10
    assert rates(run) == expected
