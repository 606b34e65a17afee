"""A run ends exactly when a plain account of the measured values says so, resumed or not."""

from __future__ import annotations

import copy
import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fundamentallm import (
    Composed,
    NotFiniteError,
    Period,
    Run,
    SettingsError,
    Snapshot,
    field,
    hookimpl,
    plugin,
    state_fields,
    train,
)
from fundamentallm.testing import PluginContract, TinyRun, assert_same_weights, compose_tiny
from fundamentallm_early_stopping import EarlyStopping

# A failing example is small as it is; to look for a smaller one would take minutes.
PHASES = (Phase.explicit, Phase.generate)
SAMPLES, EPOCH = 4, 16  # of a step and of an epoch, in the tiny data


class TestContract(PluginContract):
    plugin = EarlyStopping
    needs = {"monitor": "train/loss"}
    wrong_settings = (
        ({"patience": 0}, "early_stopping.patience: must be >= 1, got 0"),
        ({"patience": 2.5}, "early_stopping.patience: expected "),
        ({"patience": True}, "early_stopping.patience: expected "),
        ({"patience": "5 validations"}, "early_stopping.patience: unknown unit 'validations'"),
        ({"min_delta": -1.0}, "early_stopping.min_delta: must be >= 0"),
        ({"mode": "minimum"}, "did you mean 'min'?"),
        ({"stop_at": 2.0, "diverged_at": 1.0}, "early_stopping.diverged_at: 1 is no worse than"),
        ({"mode": "max", "stop_at": 1.0, "diverged_at": 2.0}, "early_stopping.diverged_at: 2 is"),
    )


def test_a_monitor_that_nothing_listed_produces_is_an_error_before_the_run_starts() -> None:
    with pytest.raises(
        SettingsError, match=r"early_stopping\.monitor: nothing listed produces 'val"
    ):
        compose_tiny("early_stopping", settings={"early_stopping": {"monitor": "val/los"}})


@plugin
class Validations:
    """Answers the n-th validation, and every step's `train/score`, with chosen values."""

    produces = ("train/score",)
    values: Any
    every: int = 1

    def at(self, step: int) -> float:
        return self.values[min((step - 1) // self.every, len(self.values) - 1)]

    @hookimpl
    def validate(self, run: Run) -> dict[str, float]:
        return {"val/loss": self.at(run.progress.step)}

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        run.log("train/score", self.at(run.progress.step))


@plugin
class Memory:
    """Keeps a snapshot of every safe point, as JSON where it is no tensor; restores one of them."""

    kept: dict[int, Snapshot] = field(init=False, factory=dict)
    restored: Snapshot | None = field(init=False, default=None)

    @hookimpl
    def read_checkpoint(self) -> Snapshot | None:
        return copy.deepcopy(self.restored)

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        snapshot = copy.deepcopy(run.snapshot())
        snapshot["plugins"] = json.loads(json.dumps(snapshot["plugins"]))
        self.kept[run.progress.step] = snapshot


def remembering(snapshot: Snapshot) -> Memory:
    """Return a memory that a run continues from ``snapshot`` with."""
    memory = Memory()
    memory.restored = snapshot
    return memory


def stop_of(run: Run) -> int | None:
    return run.progress.step if run.stop_reason else None


def known(run: Run) -> dict[str, Any]:
    """Return what is known of the metric, but for the time that it took."""
    watch = run.plugins["early_stopping"]
    state = {name: getattr(watch, name) for name in state_fields(EarlyStopping)}
    return state | {"measured": watch.measured[:3], "waiting": watch.waiting[:3]}


def watched(tiny_run: TinyRun, values: list[float], every: int = 1, **table: Any) -> Run:
    length = table.pop("length", len(values) * every)
    return tiny_run(
        Validations(values=values, every=every),
        EarlyStopping(**table),
        length=length,
        validate_every=every,
        log_every=every,
    )


def test_stops_after_patience_validations_in_a_row_without_an_improvement(
    tiny_run: TinyRun,
) -> None:
    run = watched(tiny_run, [5, 4, 4, 3, 3, 3.5, 2], patience=2, every=3)
    assert (run.progress.step, run.outcome) == (18, "stopped")
    assert run.stop_reason == (
        "val/loss is 3.5 at step 18, without an improvement for 2 validations;"
        " the best was 3 at step 12"
    )


def test_the_step_that_it_stops_at_is_validated_logged_and_at_a_safe_point(
    tiny_run: TinyRun,
) -> None:
    memory = Memory()
    run = tiny_run(
        Validations(values=[2, 3, 1]), EarlyStopping(patience=1), memory, length=9, validate_every=1
    )
    assert run.history[-1]["step"] == run.progress.step == max(memory.kept) == 2
    assert run.history[-1]["val/loss"] == 3


def test_with_mode_max_larger_values_are_better(tiny_run: TinyRun) -> None:
    run = watched(tiny_run, [1, 2, 2.5, 2, 2], mode="max", patience=2)
    assert (run.progress.step, run.plugins["early_stopping"].best) == (5, 2.5)


@pytest.mark.parametrize(
    ("table", "values", "end"),
    [
        ({"min_delta": 0.5}, [4, 3.6, 3.5, 3.4], 3),  # 3.5 is not better by more than 0.5
        ({"min_delta": 0.5}, [4, 3.4, 3.0, 3.0], 4),
        ({"min_delta": 0.1, "min_delta_mode": "relative"}, [40, 37, 36, 1], 3),
        ({"min_delta": 0.1, "min_delta_mode": "relative"}, [-10, -10.5, -11, -20], 3),
        ({"min_delta": 0.1, "min_delta_mode": "relative", "mode": "max"}, [10, 12, 13.1, 13.2], 4),
    ],
)
def test_an_improvement_is_more_than_min_delta(
    tiny_run: TinyRun, table: dict[str, Any], values: list[float], end: int
) -> None:
    length = len(values) + 3
    run = watched(tiny_run, values, patience=2 if len(values) > end else 1, length=length, **table)
    assert stop_of(run) == (end if len(values) > end else run.progress.step)


def test_a_period_is_training_since_the_best_value_at_any_rhythm_of_validations(
    tiny_run: TinyRun,
) -> None:
    # The best is that of step 2: in steps of 2, seven steps have passed at step 10.
    run = watched(tiny_run, [2, 3, 3, 3, 3, 3], every=2, patience=Period(7))
    assert run.progress.step == 10
    assert "without an improvement for 7 steps; the best was 2 at step 2" in str(run.stop_reason)


@pytest.mark.parametrize(
    ("patience", "steps"),
    [("1 epoch", 4), ("0.6 epochs", 3), ("9 tokens", 3), ("1e-9 seconds", 1), ("5 steps", 5)],
)
def test_a_period_may_have_any_unit(tiny_run: TinyRun, patience: str, steps: int) -> None:
    run = watched(tiny_run, [1.0] * 9, patience=Period.parse(patience))
    assert run.progress.step == 1 + steps


def test_before_start_no_patience_is_lost_but_the_best_value_is_tracked(tiny_run: TinyRun) -> None:
    run = watched(tiny_run, [1, 2, 3, 4, 5, 6, 7], patience=2, start=Period(4))
    assert (run.progress.step, run.plugins["early_stopping"].best) == (5, 1)


def test_a_period_counts_from_the_last_measurement_before_start(tiny_run: TinyRun) -> None:
    run = watched(tiny_run, [1, 2, 3, 4, 5, 6, 7, 8], patience=Period(3), start=Period(4))
    assert run.progress.step == 6


@pytest.mark.parametrize(
    ("table", "values", "reason"),
    [
        ({"stop_at": 0.5}, [3, 0.5, 0.1], "val/loss is 0.5 at step 2, and stop_at is 0.5"),
        ({"stop_at": 9.0, "mode": "max"}, [3, 10, 11], "val/loss is 10 at step 2, and stop_at"),
        ({"diverged_at": 8.0}, [3, 8, 1], "diverged_at is 8; the best was 3 at step 1"),
        ({"diverged_at": 0.1, "mode": "max"}, [3, 0.05, 1], "diverged_at is 0.1; the best was 3"),
    ],
)
def test_a_threshold_stops_at_once(
    tiny_run: TinyRun, table: dict[str, Any], values: list[float], reason: str
) -> None:
    run = watched(tiny_run, values, patience="unlimited", **table)
    assert run.progress.step == 2
    assert reason in str(run.stop_reason)


def test_unlimited_patience_waits_for_the_thresholds_alone(tiny_run: TinyRun) -> None:
    assert watched(tiny_run, [1.0] * 12, patience="unlimited").outcome == "finished"


def test_a_metric_of_the_rows_is_watched_too_and_the_last_step_is_validated(
    tiny_run: TinyRun,
) -> None:
    score = EarlyStopping(monitor="train/score", patience=2)
    run = tiny_run(Validations(values=[4, 3, 3, 3, 2]), score, length=9, log_every=1)
    assert run.progress.step == 5  # the row of step 4 is written after it
    assert "train/score is 3 at step 4, without an improvement for 2 rows" in str(run.stop_reason)
    assert "val/loss" in run.history[-1]


@pytest.mark.parametrize("resumed_at", [3, 4, 5])
def test_a_run_killed_before_or_after_the_step_that_stops_it_ends_at_that_step(
    tiny_run: TinyRun, resumed_at: int
) -> None:
    def score() -> list[object]:
        return [
            Validations(values=[4, 3, 3, 3, 2]),
            EarlyStopping(monitor="train/score", patience=2),
        ]

    memory = Memory()
    whole = tiny_run(*score(), memory, length=9, log_every=1)
    resumed = tiny_run(*score(), remembering(memory.kept[resumed_at]), length=9, log_every=1)
    assert resumed.progress.step == whole.progress.step == 5
    assert known(resumed) == known(whole)
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_stops_the_run_and_is_never_the_best(
    tiny_run: TinyRun, value: float
) -> None:
    score = EarlyStopping(monitor="train/score", patience="unlimited")
    run = tiny_run(Validations(values=[4, value, 1]), score, length=9, log_every=1)
    assert run.progress.step == 3
    assert f"train/score is {value:g} at step 2; the best was 4" in str(run.stop_reason)
    assert score.best == 4


def test_a_validation_that_is_not_finite_fails_the_run_as_it_does_without_this_plugin(
    tiny_run: TinyRun,
) -> None:
    with pytest.raises(NotFiniteError):
        watched(tiny_run, [4, math.nan, 1])


def test_two_instances_watch_two_metrics_in_any_order(tiny_run: TinyRun, tmp_path: Any) -> None:
    names = ["early_stopping", "score"]
    tables = {
        "early_stopping": {"patience": 3},
        "score": {"plugin": "early_stopping", "monitor": "train/score", "stop_at": 7.0},
    }
    runs = [
        tiny_run(
            *order,
            Validations(values=[9, 8, 7, 6, 5]),
            settings=tables,
            length=9,
            validate_every=1,
            log_every=1,
            run_dir=tmp_path / order[0],
        )
        for order in itertools.permutations(names)
    ]
    assert [run.progress.step for run in runs] == [4, 4]
    assert_same_weights(*runs)


def test_a_stopped_run_stays_stopped_until_its_settings_let_it_go_on(
    tiny_run: TinyRun, tmp_path: Any
) -> None:
    def again(memory: Memory, **table: Any) -> Run:
        return tiny_run(
            Validations(values=[3, 4, 5, 6, 7]),
            EarlyStopping(**table),
            memory,
            length=5,
            validate_every=1,
        )

    memory = Memory()
    assert again(memory, patience=2).progress.step == 3
    end = memory.kept[3]
    stopped = again(remembering(end), patience=2)
    assert (stopped.progress.step, stopped.outcome) == (3, "stopped")
    assert "to train on, change early_stopping in the settings" in str(stopped.stop_reason)
    assert again(remembering(end), patience=3).progress.step == 4
    assert again(remembering(end), patience=2, mode="max").outcome == "finished"


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Any]:
    period = st.builds(Period, st.integers(1, 6))
    epochs = st.builds(Period, st.sampled_from([0.25, 0.5, 0.6, 1.0]), st.just("epochs"))
    table = {
        "mode": draw(st.sampled_from(["min", "max"])),
        "patience": draw(st.one_of(st.integers(1, 4), period, epochs, st.just("unlimited"))),
        "min_delta": draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])),
        "min_delta_mode": draw(st.sampled_from(["absolute", "relative"])),
        "start": draw(st.none() | period),
        "stop_at": draw(st.none() | st.sampled_from([-7.0, 7.0])),
        "diverged_at": None,
    }
    if table["stop_at"] is None:
        table["diverged_at"] = draw(st.none() | st.sampled_from([-8.0, 8.0]))
    return table


def expected_stop(values: list[float], every: int, table: dict[str, Any]) -> int | None:
    """Return the measured step after which a run stops; check all values again at each step."""
    sign = 1 if table["mode"] == "min" else -1
    for count in range(1, len(values) + 1):
        now = sign * values[count - 1]
        good = table["stop_at"] is not None and now <= sign * table["stop_at"]
        bad = table["diverged_at"] is not None and now >= sign * table["diverged_at"]
        if good or bad or out_of_patience([sign * v for v in values[:count]], every, table):
            return count * every
    return None


def out_of_patience(values: list[float], every: int, table: dict[str, Any]) -> bool:
    """Tell whether the values up to now, the smaller the better, were too long without a best."""
    best, begun, stale = math.inf, 0, 0
    for step, value in zip(itertools.count(every, every), values, strict=False):
        scale = abs(best) if table["min_delta_mode"] == "relative" else 1
        if best == math.inf or value < best - table["min_delta"] * scale:
            best, begun, stale = value, step, 0
        elif table["start"] and step < table["start"].amount:
            begun = step
        else:
            stale += 1
    patience = table["patience"]
    if not isinstance(patience, Period):
        return patience != "unlimited" and stale >= patience
    steps = math.ceil(patience.amount * EPOCH - 1e-9) / SAMPLES
    return len(values) * every - begun >= (steps if patience.unit == "epochs" else patience.amount)


@pytest.fixture(scope="module")
def composed() -> Composed:
    """A run like those below: to look for installed plugins takes longer than to train one."""
    return compose_tiny(Validations(values=[]), EarlyStopping(), Memory(), validate_every=1)


@settings(max_examples=30, deadline=None, phases=PHASES)
@given(
    values=st.lists(st.integers(-9, 9).map(float), min_size=1, max_size=10),
    every=st.integers(1, 2),
    table=tables(),
    rows=st.booleans(),
    data=st.data(),
)
def test_any_values_stop_it_when_a_plain_account_says_also_if_resumed_anywhere(
    tmp_path_factory: pytest.TempPathFactory,
    composed: Composed,
    values: list[float],
    every: int,
    table: dict[str, Any],
    rows: bool,
    data: st.DataObject,
) -> None:
    table["monitor"] = "train/score" if rows else "val/loss"
    length = len(values) * every

    def trained(memory: Memory) -> Run:
        composed.run.length = Period(length)
        composed.run.validate_every = composed.run.log_every = Period(every)
        composed.plugins.update(
            validations=Validations(values=values, every=every),
            early_stopping=EarlyStopping(**table),
            memory=memory,
        )
        return train(composed, run_dir=tmp_path_factory.mktemp("run"))

    memory = Memory()
    whole = trained(memory)
    stop = expected_stop(values, every, table)
    assert stop_of(whole) == (stop and min(stop + rows, length))
    step = data.draw(st.sampled_from(sorted(memory.kept)), label="resumed at")
    resumed = trained(remembering(memory.kept[step]))
    assert resumed.progress.step == whole.progress.step
    assert known(resumed) == known(whole)
    assert bool(resumed.stop_reason) == bool(whole.stop_reason)
    assert_same_weights(resumed, whole)


def test_patience_is_a_number_of_measurements_or_a_period_or_unlimited() -> None:
    for stated, patience in ((5, 5), ("5 steps", Period(5)), ("unlimited", "unlimited")):
        composed = compose_tiny("early_stopping", settings={"early_stopping": {"patience": stated}})
        assert composed.plugins["early_stopping"].patience == patience
        assert composed.tables["early_stopping"]["patience"] == stated


def test_a_metric_that_is_never_measured_is_an_error_at_the_start(tiny_run: TinyRun) -> None:
    with pytest.raises(
        SettingsError, match="early_stopping: 'val/loss' is measured in validations"
    ):
        tiny_run("early_stopping", length=4)
