"""Speeds follow from counts and seconds; the table accounts for every second once; bits stay."""

from __future__ import annotations

import gc
import json
import logging
import math
import sys
from collections import Counter, deque
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fundamentallm import HOOKS, Batch, Rejection, Run, SettingsError, hookimpl, plugin
from fundamentallm.testing import (
    HostReads,
    Memory,
    PluginContract,
    Recorder,
    TinyData,
    TinyModel,
    TinyRun,
    TwoProcesses,
    assert_same_weights,
)
from fundamentallm_throughput import Throughput
from fundamentallm_throughput.clock import PHASE_OF, Clock, Marks, added
from fundamentallm_throughput.device import flops_per_token, matrix_parameters, peak_of
from fundamentallm_throughput.report import rows
from fundamentallm_throughput.sampled_steps import turns
from fundamentallm_throughput.step_timer import quantile

SPEEDS = {
    "perf/tokens_per_second",
    "perf/samples_per_second",
    "perf/step_ms",
    "perf/step_ms_median",
    "perf/step_ms_p99",
    "system/host_memory_gib",
}


class TestContract(PluginContract):
    plugin = Throughput
    needs = {"sample_every": 2}
    wrong_settings = (
        ({"sample_every": 0}, "throughput.sample_every: must be >= 1"),
        ({"peak_flops": 0}, "throughput.peak_flops: must be > 0"),
        ({"flops_per_token": "many"}, "throughput.flops_per_token: expected a number"),
    )


def measured(row: dict[str, float]) -> dict[str, float]:
    return {name: row[name] for name in row if name.startswith(("perf/", "system/"))}


def rest(run: Run) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in measured(row)} for row in run.history]


def read(run: Run) -> dict[str, Any]:
    return json.loads((run.folder / "throughput.json").read_text())


def took(run: Run) -> dict[tuple[str, str], float]:
    return {(row["phase"], row["plugin"]): row["seconds"] for row in read(run)["where"]}


class Seconds:
    """A clock that advances only when a test sets its time."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def timing(clock: Clock, **settings: Any) -> Throughput:
    """Make the plugin with a clock of its own."""

    class Timing(Throughput):
        """Throughput with the given clock."""

        def clock(self, run: Run) -> Clock:
            return clock

    return Timing(**settings)


def parts(clock: Clock) -> dict[tuple[str, str] | None, float]:
    return added(clock.parts, clock.marks.seconds)


# --- the clock


def test_a_call_inside_another_counts_once_and_for_the_inner_one():
    now = Seconds()
    clock = Clock(now)

    def spend(seconds, *inside):
        def call(**_):
            now.time += seconds / 2
            for one in inside:
                one()
            now.time += seconds / 2
            return "answer"

        return call

    forward = clock.timed("amp", "forward", spend(8))
    backward = clock.timed("core", "backward", spend(16))
    microbatch = clock.timed("core", "train_microbatch", spend(2, forward, backward))
    assert microbatch() == "answer"
    assert parts(clock) == {
        ("micro-batch", "core"): 2,
        ("forward", "amp"): 8,
        ("backward", "core"): 16,
    }
    assert clock.between == 0
    clock.timed("core", "validate", spend(32, forward, forward))()
    assert clock.seconds["validation", "amp"] == 16
    assert clock.seconds["validation", "core"] == 32
    assert parts(clock)["forward", "amp"] == 8
    assert clock.between == 48


def test_a_call_that_raises_is_timed_and_leaves_the_clock_in_order():
    now = Seconds()
    clock = Clock(now)

    def fail(**_):
        now.time += 3
        raise RuntimeError("on purpose")

    def outer(**_):
        now.time += 1
        inner = clock.timed("sample", "evaluation_weights", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            inner()

    clock.timed("sample", "on_safe_point", outer)()
    clock.timed("core", "forward", lambda: None)()
    assert clock.seconds == {("safe point", "sample"): 4, ("validation", "sample"): 0}
    assert parts(clock) == {("forward", "core"): 0}
    assert clock.between == 4


@given(st.recursive(st.just([]), st.lists, max_leaves=20))
def test_however_calls_are_nested_the_seconds_add_up(tree):
    now = Seconds()
    clock = Clock(now)
    hooks = sorted(PHASE_OF)

    def call(children, number):
        def spend():
            now.time += 1
            for index, child in enumerate(children):
                clock.timed(
                    str(index), hooks[(number + index) % len(hooks)], call(child, number + 7)
                )()

        return spend

    call(tree, 0)()
    assert math.isclose(sum(clock.seconds.values()) + sum(parts(clock).values()), now.time - 1)


def test_the_clock_separates_calls_between_steps_from_the_parts_of_a_timed_step():
    now = Seconds()
    clock = Clock(now)

    def spend(**_):
        now.time += 4

    def evaluate(**_):
        clock.timed("core", "forward", spend, in_step=True)()

    clock.timed("core", "forward", spend, in_step=True)()
    clock.timed("sample", "on_safe_point", evaluate, in_step=True)()
    clock.timed("text", "collect_batches", clock.timed("bar", "on_progress", spend, in_step=True))()
    assert clock.seconds["safe point", "core"] == clock.between == 4
    assert parts(clock) == {
        ("forward", "core"): 4,
        None: 4,
        ("data", "bar"): 4,
        ("data", "text"): 0,
    }


def test_every_hook_has_a_phase_except_the_first_the_last_and_stop_agreed():
    untimed = {"join_processes", "on_run_start", "finish_model", "on_train_end", "stop_agreed"}
    assert set(HOOKS) - set(PHASE_OF) == untimed
    assert set(PHASE_OF) <= set(HOOKS)


@given(st.lists(st.floats(0, 1e9), min_size=1), st.floats(0.01, 1))
def test_a_quantile_is_the_smallest_value_that_the_share_reaches(values, q):
    found = quantile(sorted(values), q)
    assert found in values
    assert sum(v <= found for v in values) >= q * len(values)
    assert sum(v < found for v in values) < q * len(values)


# --- the rows


def test_every_row_has_the_speeds_and_they_agree_with_each_other(tiny_run: TinyRun):
    run = tiny_run(Throughput(), length=10, log_every=3, validate_every=2)
    assert len(run.history) == 7
    for row in run.history:
        assert set(measured(row)) == SPEEDS
        assert 0 < row["perf/step_ms_median"] <= row["perf/step_ms_p99"]
        assert row["perf/step_ms"] >= row["perf/step_ms_median"] / 2
        assert row["perf/tokens_per_second"] == row["perf/samples_per_second"]
        per_step = row["perf/samples_per_second"] * row["perf/step_ms"] / 1000
        assert math.isclose(per_step, 4)
    assert read(run)["tokens"] == 40
    assert read(run)["steps"] == 10


def test_the_metrics_of_a_validation_have_no_speeds(tiny_run: TinyRun):
    @plugin
    class Listener:
        """Keeps what validations bring."""

        def __attrs_post_init__(self):
            self.received = []

        @hookimpl
        def on_validation_end(self, metrics):
            self.received.append(dict(metrics))

    listener = Listener()
    run = tiny_run(Throughput(), listener, length=4, validate_every=2, validate_first=True)
    assert [set(metrics) for metrics in listener.received] == [{"val/loss"}] * 3
    assert [len(measured(row)) for row in run.history] == [0, 6, 6]


def test_mfu_is_flops_times_tokens_over_what_the_device_can_do(tiny_run: TinyRun, tmp_path: Path):
    run = tiny_run(Throughput(peak_flops=1e9), length=4)
    for row in run.history:
        parameters = 8 * 16 + 16 + 16 + 1
        assert row["perf/mfu"] == 6.0 * parameters * row["perf/tokens_per_second"] / 1e9
    run = tiny_run(Throughput(peak_flops=1e9, flops_per_token=5.0), run_dir=tmp_path / "given")
    assert run.history[0]["perf/mfu"] == 5.0 * run.history[0]["perf/tokens_per_second"] / 1e9


def test_mfu_follows_a_schedule_of_the_context_length(tiny_run: TinyRun):
    class Growing:
        epoch_samples, fingerprint = 16, "growing"

        def __init__(self, samples):
            self.samples = samples

        def batches(self, progress):
            for number, batch in enumerate(self.samples.batches(progress)):
                yield Batch(batch.data, batch.weight, 4, 4 * (32 if number < 3 else 96))

        def validation(self):
            return {}

    @plugin
    class Longer(TinyData):
        """Samples of 32 tokens in three steps, and then of 96."""

        @hookimpl
        def build_data(self, run):
            return Growing(TinyData.build_data(self, run))

    @plugin
    class Counted(TinyModel):
        """A model that says what a token costs."""

        @hookimpl
        def build_model(self):
            model = TinyModel.build_model(self)
            model.flops_per_token = lambda length: 1000 * length
            return model

    run = tiny_run(Longer(), Counted(), Throughput(peak_flops=1e9), length=6, log_every=3)
    for row, length in zip(run.history, (32, 96), strict=True):
        expected = 1000 * length * row["perf/tokens_per_second"] / 1e9
        assert math.isclose(row["perf/mfu"], expected)


def test_a_model_can_state_the_flops_of_a_token():
    class Own(nn.Module):
        def flops_per_token(self, length):
            return 7 * length

    assert flops_per_token(Own(), 32) == 7 * 32


def test_parameters_that_are_only_looked_up_cost_nothing():
    tied = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    assert matrix_parameters(tied) == 40
    tied[1].weight = tied[0].weight
    assert matrix_parameters(tied) == 40
    assert flops_per_token(tied, 8) == 240
    assert matrix_parameters(nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4))) == 8


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("Some GPU", None),
    ],
)
def test_known_devices_are_found_by_their_name(name, peak):
    assert peak_of(name) == peak


def test_a_model_whose_flops_fail_mutes_the_plugin_and_not_the_run(tiny_run, caplog):
    @plugin
    class Odd(TinyModel):
        """A model whose count is broken."""

        @hookimpl
        def build_model(self):
            model = TinyModel.build_model(self)
            model.flops_per_token = lambda length: 1 / 0
            return model

    run = tiny_run(Odd(), Throughput(peak_flops=1.0), length=4, log_every=2)
    assert run.outcome == "finished"
    assert [measured(row) for row in run.history] == [{}, {}]
    assert caplog.text.count("throughput logs nothing from now on") == 1


# --- where the time went


def test_the_shares_add_up_to_one_and_name_every_plugin_that_was_called(tiny_run: TinyRun):
    @plugin
    class Busy:
        """Listens to a hook of every kind."""

        @hookimpl
        def on_step_start(self, run: Run):
            torch.ones(4).sum()

        @hookimpl
        def edit_gradients(self, run: Run):
            torch.ones(4).sum()

        @hookimpl
        def lr_factor(self, run: Run):
            return 1.0

        @hookimpl
        def on_safe_point(self, run: Run):
            torch.ones(4).sum()

        @hookimpl(wrapper=True)
        def forward(self, run: Run):
            return (yield)

        @hookimpl(wrapper=True)
        def validate(self, run: Run):
            return (yield)

    run = tiny_run(Busy(), Throughput(sample_every=3), length=10, validate_every=4)
    facts = read(run)
    assert facts["timed_steps"] == 4
    assert math.isclose(sum(row["share"] for row in facts["where"]), 1)
    assert math.isclose(sum(took(run).values()), facts["seconds"])
    assert {
        ("start-up", "tiny_data"),
        ("start-up", "tiny_model"),
        ("data", "core"),
        ("forward", ""),
        ("backward", "core"),
        ("optimizer", "core"),
        ("optimizer", "busy"),
        ("gradients", "busy"),
        ("events", "busy"),
        ("safe point", "busy"),
        ("validation", ""),
        ("rest", "core"),
    } <= took(run).keys()


def test_rows_are_in_the_order_of_a_run_and_the_remaining_time_is_the_rest():
    taken = {
        ("other steps", "unknown"): 3.0,
        ("forward", "core"): 8.0,
        ("backward", "amp"): 12.0,
        ("first step", "core"): 5.0,
        ("validation", "core"): 10.0,
        ("log", "bar"): 0.0,
    }
    assert [(row.phase, row.plugin, row.seconds, row.share) for row in rows(taken, 40.0)] == [
        ("first step", "core", 5.0, 0.125),
        ("forward", "core", 8.0, 0.2),
        ("backward", "amp", 12.0, 0.3),
        ("other steps", "unknown", 3.0, 0.075),
        ("validation", "core", 10.0, 0.25),
        ("rest", "core", 2.0, 0.05),
    ]


@given(st.integers(1, 40), st.integers(0, 2**63))
def test_one_step_of_each_window_is_sampled_and_each_position_equally_often(every, seed):
    small = (every - 1).bit_length()
    steps, weights = zip(*islice(turns(every, Random(seed)), small + 2 * every), strict=True)
    assert weights == (*(2**n for n in range(small)), *[every] * 2 * every)
    end = 1
    for step, weight in zip(steps, weights, strict=True):
        assert end < step <= end + weight
        end += weight
    for places in (steps[small : small + every], steps[small + every :]):
        assert sorted((step - 2**small - 1) % every for step in places) == list(range(every))


@pytest.mark.parametrize(
    ("period", "length", "off"),
    [(10, 500, 1 / 4), (10, 2000, 1 / 15), (7, 2000, 1 / 3), (50, 2000, 0.8)],
)
def test_periodic_work_is_sampled_about_as_often_as_it_happens(
    period: int, length: int, off: float
):
    errors = []
    for seed in range(200):
        timed = [turn for turn in islice(turns(20, Random(seed)), length) if turn[0] <= length]
        met = sum(weight for step, weight in timed if (step + seed) % period == 0)
        errors.append(met / sum(weight for _, weight in timed) * period - 1)
    assert abs(sum(errors) / 200) < 0.1
    assert math.sqrt(sum(error**2 for error in errors) / 200) < off


@pytest.mark.parametrize(
    ("every", "length", "timed"),
    [(1, 7, 6), (2, 6, 3), (5, 13, 4), (20, 1, 0), (20, 2, 1), (20, 52, 6)],
)
def test_one_step_in_sample_every_is_timed_hook_by_hook_and_more_at_the_start(
    tiny_run: TinyRun, every: int, length: int, timed: int
):
    run = tiny_run(Throughput(sample_every=every), length=length)
    assert read(run)["timed_steps"] == timed
    assert (("forward", "core") in took(run)) == (timed > 0)
    assert ("first step", "core") in took(run)


@plugin
class Spender:
    """Lets a clock go on: by some seconds in each step, and by more at some times."""

    now: Any
    always: float = 0.0
    once: float = 0.0
    tenth: float = 0.0
    at: int = 0
    there: float = 0.0
    between: float = 0.0

    @hookimpl
    def on_safe_point(self):
        self.now.time += self.between

    @hookimpl
    def on_step_start(self, run: Run):
        self.now.time += self.always + self.once
        self.once = 0.0

    @hookimpl
    def on_step_end(self, run: Run):
        self.now.time += self.tenth if run.progress.step % 10 == 0 else 0.0
        self.now.time += self.there if run.progress.step == self.at else 0.0


@plugin
class Odd(Spender):
    """Another one."""


@pytest.mark.parametrize("first", [True, False])
def test_the_time_of_work_in_every_tenth_step_is_about_right(tiny_run: TinyRun, first: bool):
    now = Seconds()
    watch = timing(Clock(now))
    spenders = [Spender(now=now, always=0.03), Odd(now=now, tenth=0.3)]
    listed = [watch, *spenders] if first else [*spenders, watch]
    run = tiny_run(*listed, length=432, log_every=50)
    facts = read(run)
    assert facts["timed_steps"] == 25
    assert math.isclose(facts["seconds"], 432 * 0.03 + 43 * 0.3)
    shares = {row["plugin"]: row["share"] for row in facts["where"] if row["phase"] == "events"}
    assert abs(shares["spender"] - 0.5) < 0.1
    assert abs(shares["odd"] - 0.5) < 0.1


def test_a_slow_first_step_counts_for_no_other_step_also_after_a_resume(
    tiny_run: TinyRun, tmp_path: Path
):
    now, memory = Seconds(), Memory(step=12)
    for name, steps in (("run", 32), ("continued", 20)):
        usual, slow = Spender(now=now, always=0.25, between=4.0), Odd(now=now, once=64.0)
        run = tiny_run(usual, slow, timing(Clock(now)), memory, length=32, run_dir=tmp_path / name)
        found = took(run)
        assert read(run)["steps"] == steps
        assert found["first step", "odd"] == 64
        assert found["first step", "spender"] == 0.25
        assert math.isclose(found["events", "spender"], 0.25 * (steps - 1))
        assert found["safe point", "spender"] == 4 * steps
        assert ("other steps", "unknown") not in found
        assert ("events", "odd") not in found
        assert ("rest", "core") not in found


def test_the_extra_time_of_a_step_that_is_not_timed_counts_for_no_plugin(tiny_run, tmp_path):
    now, timed = Seconds(), Timed()
    tiny_run(timing(Clock(now)), timed, length=60, run_dir=tmp_path / "looked on")
    assert timed.steps[0] == 1
    slow = min(set(range(30, 60)) - set(timed.steps))
    usual, odd = Spender(now=now, always=0.25), Odd(now=now, at=slow, there=64.0)
    found = took(tiny_run(usual, odd, timing(Clock(now)), length=60, run_dir=tmp_path / "slow"))
    assert math.isclose(found["other steps", "unknown"], 64)
    assert math.isclose(found["events", "spender"], 0.25 * 59)
    assert ("events", "odd") not in found


@plugin
class Timed:
    """Notes which steps are timed hook by hook."""

    def __attrs_post_init__(self):
        self.hooks, self.steps = [], []

    @hookimpl
    def on_step_start(self, run: Run):
        self.hooks.append(run.hook)
        if run.hook is self.hooks[0]:
            self.steps.append(run.progress.step + 1)


class Device:
    """Works off what the host has queued, in its own time; the host is a step ahead at most."""

    def __init__(self, now: Seconds) -> None:
        self.now, self.time, self.fence = now, 0.0, [0.0]
        self.queue: deque[tuple[float, Any]] = deque()
        self.marks = Marks(self.mark, lambda end, start: end[0] - start[0], bool, self.wait)
        self.waits = 0

    def add(self, seconds: float) -> None:
        self.queue.append((self.now.time, seconds))

    def mark(self) -> list[float]:
        self.queue.append((self.now.time, []))
        return self.queue[-1][1]

    def wait(self) -> None:
        self.waits += 1
        self.work()

    def work(self, until: list[float] | None = None) -> None:
        while self.queue and not until:
            queued, what = self.queue.popleft()
            self.time = max(self.time, queued)
            if isinstance(what, list):
                what.append(self.time)
            else:
                self.time += what
        self.now.time = max(self.now.time, self.time)

    def wait_for_the_step_before(self) -> None:
        before, self.fence = self.fence, self.mark()
        self.work(before)


@plugin
class Queuing:
    """Gives a device work, and is quick about it."""

    device: Any

    @hookimpl
    def on_step_start(self):
        self.device.wait_for_the_step_before()
        self.device.now.time += 0.001
        self.device.add(0.25)

    @hookimpl
    def edit_gradients(self):
        self.device.now.time += 0.001
        self.device.add(0.75)

    @hookimpl
    def on_validation_end(self):
        self.device.now.time += 8.0


def test_parts_of_a_step_have_the_time_of_the_device_not_that_of_queuing(tiny_run):
    now = Seconds()
    device = Device(now)
    run = tiny_run(
        Queuing(device=device), timing(Clock(now, device.marks)), length=150, log_every=10
    )
    found = took(run)
    assert read(run)["timed_steps"] >= 10
    assert math.isclose(found["events", "queuing"], 0.25 * 149, rel_tol=0.02)
    assert math.isclose(found["gradients", "queuing"], 0.75 * 149, rel_tol=0.02)
    assert device.waits == 1  # for the validation at the end


def test_work_that_steps_have_queued_is_not_time_of_a_validation(tiny_run: TinyRun):
    now = Seconds()
    device = Device(now)
    listed = [Queuing(device=device), timing(Clock(now, device.marks))]
    run = tiny_run(*listed, length=4, validate_every=2)
    assert sum(s for (phase, _), s in took(run).items() if phase == "validation") == 16
    assert [math.isclose(row["perf/step_ms"], 1000, rel_tol=0.01) for row in run.history] == [
        True
    ] * 2


def test_each_second_of_a_timed_step_counts_once(tiny_run: TinyRun):
    run = tiny_run(Throughput(sample_every=1), length=20)
    inside = [
        s
        for (phase, _), s in took(run).items()
        if phase in ("data", "micro-batch", "forward", "backward", "gradients", "optimizer")
    ]
    outside = [s for (phase, _), s in took(run).items() if phase == "start-up"]
    assert 0 < sum(inside) <= (read(run)["seconds"] - sum(outside)) * (1 + 1e-9)


def test_the_table_is_in_the_log_before_the_log_is_closed(
    tiny_run: TinyRun, tmp_path: Path, caplog
):
    caplog.set_level(logging.INFO)
    for number, listed in enumerate((["console", Throughput()], [Throughput(), "console"])):
        run = tiny_run(*listed, length=3, run_dir=tmp_path / str(number))
        text = (run.folder / "train.log").read_text()
        assert text.count("where the time went") == 1
        assert "3 steps" in text
    assert "forward" in caplog.text
    caplog.clear()
    tiny_run(Throughput(table=False), run_dir=tmp_path / "untold")
    assert "where the time went" not in caplog.text
    assert (tmp_path / "untold" / "throughput.json").is_file()


def test_a_failed_run_prints_the_table_and_a_run_that_never_began_does_not(tiny_run, tmp_path):
    @plugin
    class Bomb:
        """Fails in one hook."""

        early: bool

        @hookimpl
        def adapt_model(self, run: Run):
            if self.early:
                raise ValueError("early")

        @hookimpl
        def on_step_end(self, run: Run):
            if run.progress.step == 3:
                raise ValueError("late")

    with pytest.raises(Exception, match="late"):
        tiny_run(Throughput(), Bomb(early=False), length=9, run_dir=tmp_path / "late")
    assert json.loads((tmp_path / "late" / "throughput.json").read_text())["steps"] == 3
    with pytest.raises(Exception, match="early"):
        tiny_run(Throughput(), Bomb(early=True), run_dir=tmp_path / "early")
    assert not (tmp_path / "early" / "throughput.json").exists()


# --- and nothing else


@pytest.mark.parametrize("every", [1, 2, 20])
def test_a_run_with_throughput_ends_with_the_same_bits(
    tiny_run: TinyRun, tmp_path: Path, every: int
):
    runs = [
        tiny_run(*listed, length=9, log_every=2, validate_every=3, run_dir=tmp_path / str(n))
        for n, listed in enumerate(([], [Throughput(sample_every=every)]))
    ]
    assert_same_weights(*runs)
    assert rest(runs[0]) == rest(runs[1])


def test_rejected_steps_and_a_rewind_are_counted_and_change_nothing(
    tiny_run: TinyRun, tmp_path: Path
):
    @plugin
    class Picky:
        """Rejects a step, and goes back once."""

        gone_back: bool = False

        @hookimpl
        def judge_step(self, run: Run):
            return Rejection("other", "picky") if run.progress.step == 2 else None

        @hookimpl
        def on_step_end(self, run: Run):
            if run.progress.step == 6 and not self.gone_back:
                self.gone_back = True
                run.rewind("latest")

    settings = {"checkpoint": {"every": 2}}
    runs = [
        tiny_run(
            "checkpoint", Picky(), *listed, length=8, settings=settings, run_dir=tmp_path / str(n)
        )
        for n, listed in enumerate(([], [Throughput(sample_every=1)]))
    ]
    assert_same_weights(*runs)
    assert rest(runs[0]) == rest(runs[1])
    assert ("restore", "checkpoint") in took(runs[1])
    assert ("safe point", "checkpoint") in took(runs[1])
    for row in runs[1].history:
        assert measured(row).keys() == SPEEDS
        assert all(value > 0 for value in measured(row).values())


def test_a_run_continued_in_the_middle_is_the_run_that_never_stopped(
    tiny_run: TinyRun, tmp_path: Path
):
    settings = {"checkpoint": {"every": 3}}
    whole = tiny_run(
        "checkpoint", Throughput(), length=8, settings=settings, run_dir=tmp_path / "whole"
    )
    tiny_run("checkpoint", Throughput(), length=3, settings=settings, run_dir=tmp_path / "parts")
    parts = tiny_run(
        "checkpoint", Throughput(), length=8, settings=settings, run_dir=tmp_path / "parts"
    )
    assert_same_weights(whole, parts)
    assert rest(whole)[-1] == rest(parts)[-1]
    assert read(parts)["steps"] == 5
    assert read(parts)["tokens"] == 20


def test_the_hooks_are_restored_at_the_end(tiny_run: TinyRun):
    @plugin
    class Keeper:
        """Remembers the hooks of the beginning."""

        @hookimpl
        def on_run_start(self, run: Run):
            self.hook = run.hook if not hasattr(self, "hook") else self.hook

    keeper = Keeper()
    assert tiny_run(keeper, Throughput()).hook is keeper.hook


def test_hooks_that_another_plugin_sets_stay(tiny_run: TinyRun):
    recorder = Recorder()
    run = tiny_run(Throughput(sample_every=1), length=3, trace=recorder)
    assert recorder.names.count("optimizer_step") == 3
    assert recorder.names[-1] == "on_train_end"
    assert read(run)["timed_steps"] == 0
    assert all(measured(row).keys() == SPEEDS for row in run.history)


def test_listing_throughput_twice_is_an_error_that_names_both(tiny_run: TinyRun):
    settings = {"speed": {"plugin": "throughput"}}
    with pytest.raises(SettingsError, match="throughput and speed are both throughput"):
        tiny_run("throughput", "speed", settings=settings)


@plugin
class Between:
    """Looks on from the data of one step to that of another."""

    first: int
    last: int
    start: Any
    stop: Any

    @hookimpl(wrapper=True)
    def collect_batches(self, run: Run):
        if run.progress.step == self.first:
            self.start()
        if run.progress.step == self.last:
            self.stop()
        return (yield)


def calls(tiny_run: TinyRun, folder: Path, *listed: object) -> int:
    """Count the Python calls of a step that neither logs nor is timed: the fewest of some."""
    found: Counter[int] = Counter()

    @plugin
    class Counting:
        """Counts the calls of each step."""

        step: int = 0

        @hookimpl(wrapper=True)
        def collect_batches(self, run: Run):
            self.step = run.progress.step
            return (yield)

    counting = Counting()

    def note(frame: Any, event: str, _: object) -> None:
        found[counting.step] += event == "call"

    def start() -> None:
        gc.disable()  # when a collection falls due is chance, and torch listens to it
        sys.setprofile(note)

    def stop() -> None:
        sys.setprofile(None)
        gc.enable()

    between = Between(first=33, last=52, start=start, stop=stop)
    tiny_run(between, counting, *listed, length=53, log_every=100, run_dir=folder)
    return min(found[step] for step in range(34, 51))


def test_a_step_that_is_not_timed_makes_one_more_call_and_one_for_each_plugin_at_safe_points(
    tiny_run: TinyRun, tmp_path: Path
):
    @plugin
    class Saver:
        """Listens at safe points."""

        @hookimpl
        def on_safe_point(self, run: Run):
            pass

    bare = calls(tiny_run, tmp_path / "bare")
    assert calls(tiny_run, tmp_path / "watched", Throughput()) - bare == 1
    saving = calls(tiny_run, tmp_path / "saving", Saver())
    assert calls(tiny_run, tmp_path / "both", Saver(), Throughput()) - saving == 2


def test_no_step_reads_a_device_value(tiny_run: TinyRun, tmp_path: Path):
    counts = []
    for number, listed in enumerate(([], [Throughput(sample_every=2)])):
        reads = HostReads()
        between = Between(
            first=2,
            last=6,
            start=reads.start,
            stop=reads.stop,
        )
        tiny_run(between, *listed, length=7, log_every=100, run_dir=tmp_path / str(number))
        counts.append(reads.count)
    # Those are PyTorch's own: an AdamW that is not fused keeps its count of steps in a tensor.
    assert counts[0] == counts[1] > 0


# --- several processes


@plugin
class SlowIn:
    """Takes some time for its forward passes, in one process more, and waits in the others."""

    now: Seconds
    slow: int
    seconds: float = 3.0

    @hookimpl(wrapper=True)
    def train_microbatch(self, run: Run):
        answer = yield
        self.now.time += self.seconds - self.own(run)
        return answer

    @hookimpl(wrapper=True)
    def forward(self, run: Run):
        if run.phase == "train":
            self.now.time += self.own(run)
        return (yield)

    def own(self, run: Run) -> float:
        return self.seconds if run.rank == self.slow else 1.0


@pytest.mark.parametrize("seconds", [3.0, 1.25])
def test_a_process_that_slows_the_others_down_is_named(two_processes: TwoProcesses, seconds: float):
    now = Seconds()
    listed = "console", timing(Clock(now), sample_every=1), SlowIn(now=now, slow=1, seconds=seconds)
    first, second = two_processes(*listed, length=12, log_every=2)
    names = ("slowest_process", "slowest_process_own_ms", "median_process_own_ms", "step_ms")
    rows = [tuple(row.get(f"perf/{name}") for name in names) for row in first.history]
    step = 1000.0 * seconds
    assert rows == [(None, None, None, step), *[(1.0, step, 1000.0, step)] * 5]
    assert second.history == first.history
    said = (first.folder / "train.log").read_text().count("process 1 slows the others down")
    assert said == (1 if seconds == 3.0 else 0)


def test_several_processes_have_the_tokens_and_the_peak_of_all(two_processes: TwoProcesses):
    now = Seconds()
    watch = timing(Clock(now), peak_flops=1e9, flops_per_token=5.0)
    for one in two_processes(watch, SlowIn(now=now, slow=-1, seconds=2.0), length=4):
        # A batch of 4 samples in 2 seconds, on two devices.
        assert [row["perf/tokens_per_second"] for row in one.history] == [2.0, 2.0]
        assert [row["perf/mfu"] for row in one.history] == [5.0 * 2.0 / 2e9] * 2
