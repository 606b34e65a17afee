"""Settings of other plugins follow schedules: exactly, in any order, from any point on."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fundamentallm import (
    Batch,
    Period,
    Progress,
    Rejection,
    Run,
    RunSettings,
    SettingsError,
    attribute_docs,
    compose,
    field,
    ge,
    gt,
    hookimpl,
    le,
    plugin,
    setting_fields,
)
from fundamentallm.testing import PluginContract, TinyRun, TinySamples, assert_same_weights
from fundamentallm_lr_schedule import LrSchedule, Scheduled, Schedules

STEPS = 10_000


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, ".end: is missing; shape 'linear' needs it"),
    ({"end": "8"}, ".end: expected a number"),
    ({"end": 8, "shape": "triangle"}, ".shape: unknown value"),
    ({"end": 8, "untill": 3}, ".untill: unknown setting"),
    ({"end": 8, "warmup": 5}, ".peak: is missing; it is the value at the end of the warmup"),
    ({"end": 8, "peak": 5}, ".peak: needs a warmup"),
    (
        {"shape": "constant"},
        ".warmup: is missing; without a warmup, a constant does not change",
    ),
    ({"shape": "constant", "warmup": 5, "peak": 2, "end": 8}, ".end: has no meaning"),
    ({"shape": "step", "at": 5}, ".gamma: is missing; shape 'step' needs it"),
    ({"shape": "step", "at": [], "gamma": 2.0}, ".at: is missing"),
    ({"shape": "step", "at": [0.5, 2.5], "gamma": 2.0}, ".at: a fraction of the run"),
    ({"shape": "step", "at": [5], "gamma": 2.0, "length": 5}, ".length: has no meaning"),
    ({"end": 8, "gamma": 2.0}, ".gamma: belongs to shape 'step'"),
    ({"end": 8, "multiple_of": 0}, ".multiple_of: must be >= 1"),
]


class TestContract(PluginContract):
    plugin = Schedules
    needs = {"of": {"tiny_data": {"batch_size": {"end": 8.0}}}}
    wrong_settings = tuple(
        ({"of": {"cut": {"batch_size": table}}}, f"schedules.of.cut.batch_size{text}")
        for table, text in WRONG
    )


@plugin
class Cut:
    """Data that reads its batch size whenever a stream begins."""

    batch_size: int = field(default=4, validator=[ge(1), le(64)])
    """Samples in a micro-batch."""
    shuffle: bool = False
    """No number."""
    seed: int | None = None
    """A number that nothing states."""

    opened: Any = field(init=False, factory=list)

    @hookimpl
    def build_data(self) -> Any:
        return Samples(self)


class Samples(TinySamples):
    def __init__(self, cut: Cut) -> None:
        super().__init__(4, "cpu")
        self.cut = cut

    def batches(self, progress: Progress) -> Iterator[Batch]:
        self.cut.opened.append(progress.samples)
        self.batch_size = self.cut.batch_size
        return super().batches(progress)

    def validation(self) -> dict[str, list[Batch]]:
        return {}


@plugin
class Windows:
    """Takes several micro-batches for a step."""

    count: int = field(default=1, validator=ge(1))
    """Micro-batches in a window."""
    ratio: float = field(default=0.5, validator=[gt(0), le(1)])
    """A number without effect."""
    label: str = ""
    """No number."""

    seen: Any = field(init=False, factory=list)

    @hookimpl
    def on_step_start(self) -> None:
        self.seen.append((self.count, self.ratio))

    @hookimpl
    def collect_batches(self, stream: Iterator[Batch]) -> list[Batch]:
        return [next(stream) for _ in range(self.count)]


@plugin
class Decaying:
    """AdamW with three groups: one decayed, one not, one in its own way."""

    lr: float = 0.01
    """Base learning rate."""
    weight_decay: float = field(default=0.1, validator=ge(0))
    """Of the decayed group."""
    beta1: float = 0.9
    """Decay rate of the mean."""

    seen: Any = field(init=False, factory=list)

    @hookimpl
    def build_optimizer(self, run: Run) -> torch.optim.Optimizer:
        hidden, bias, *out = run.model.parameters()
        groups = [
            {"params": [hidden], "weight_decay": self.weight_decay},
            {"params": [bias], "weight_decay": 0.0},
            {"params": out, "weight_decay": 0.5},
        ]
        return torch.optim.AdamW(groups, self.lr, (self.beta1, 0.999))

    @hookimpl
    def optimizer_step(self, run: Run) -> None:
        groups = run.optimizer.param_groups
        self.seen.append(([g["weight_decay"] for g in groups], [g["betas"] for g in groups]))
        run.optimizer.step()


def schedules(**of: dict[str, Scheduled]) -> Schedules:
    return Schedules(of=of)


def test_a_setting_follows_its_schedule_and_is_logged(tiny_run: TinyRun) -> None:
    windows = Windows()
    ramp = schedules(windows={"count": Scheduled(end=5)})
    run = tiny_run(windows, ramp, length=8, log_every=1)
    # 1 + 4 x at x = 0, 1/8, ..., rounded to the nearest, halves up.
    assert [count for count, _ in windows.seen] == [1, 2, 2, 3, 3, 4, 4, 5]
    assert [row["schedules/windows.count"] for row in run.history] == [1, 2, 2, 3, 3, 4, 4, 5]
    assert run.progress.microbatches == 24


def test_rejected_steps_do_not_advance_a_scheduled_setting(tiny_run: TinyRun) -> None:
    @plugin
    class RejectSecond:
        """Rejects every second step."""

        @hookimpl
        def judge_step(self, run: Run) -> Rejection | None:
            return Rejection("other", "every second one") if run.progress.step % 2 else None

    windows = Windows()
    ramp = schedules(windows={"count": Scheduled(end=5, length=Period(4))})
    tiny_run(windows, ramp, RejectSecond(), length=8)
    assert [count for count, _ in windows.seen] == [1, 2, 2, 3, 3, 4, 4, 5]


def test_a_changed_batch_size_reopens_the_data_after_the_last_batch(
    tiny_run: TinyRun,
) -> None:
    taken: list[range] = []

    @plugin
    class Watch:
        """Keeps the samples of every step."""

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            taken.extend(range(b.first, b.first + b.samples) for b in run.window)

    cut = Cut()
    ramp = schedules(cut={"batch_size": Scheduled(start=2, end=10, length=0.5, multiple_of=4)})
    tiny_run(cut, ramp, Watch(), length=8)
    assert [len(one) for one in taken] == [4, 4, 8, 8, 12, 12, 12, 12]
    assert [i for one in taken for i in one] == list(range(72))
    assert cut.opened == [0, 8, 24]  # no more often than it has to


def test_weight_decay_changes_only_in_groups_that_use_the_settings_value(tiny_run: TinyRun) -> None:
    optimizer = Decaying()
    course = {
        "weight_decay": Scheduled(start=0.0, end=0.4),
        "beta1": Scheduled(shape="constant", start=0.5, peak=0.9, warmup=Period(2)),
    }
    tiny_run(optimizer, schedules(decaying=course), length=4)
    for index, (decays, betas) in enumerate(optimizer.seen):
        assert decays == [0.4 * index / 4, 0.0, 0.5]
        assert betas == [(0.5 + 0.4 * min(index / 2, 1), 0.999)] * 3
    assert len(optimizer.seen) == 4


def test_the_updates_equal_those_of_plain_torch_with_the_same_weight_decay(
    tiny_run: TinyRun,
) -> None:
    @plugin
    class Shadow:
        """Trains a copy with an optimizer of its own."""

        @hookimpl
        def on_train_start(self, run: Run) -> None:
            self.model = copy.deepcopy(run.model)
            self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            pairs = list(zip(self.model.parameters(), run.model.parameters(), strict=True))
            for mine, theirs in pairs:
                assert theirs.grad is not None
                mine.grad = theirs.grad.clone()
            self.optimizer.param_groups[0]["weight_decay"] = 0.3 * (1 - (run.progress.step - 1) / 6)
            self.optimizer.step()
            assert all(mine.equal(theirs) for mine, theirs in pairs)

    @plugin
    class All:
        """Decays everything."""

        weight_decay: float = 0.3
        """Of all parameters."""

        @hookimpl
        def build_optimizer(self, run: Run) -> torch.optim.Optimizer:
            return torch.optim.AdamW(run.model.parameters(), 0.01, weight_decay=self.weight_decay)

    run = tiny_run(All(), Shadow(), schedules(all={"weight_decay": Scheduled(end=0.0)}), length=6)
    assert run.outcome == "finished"


def many() -> tuple[object, ...]:
    """Make plugins of which much is scheduled at once."""
    of = {
        "cut": {"batch_size": Scheduled(start=1, end=9, length=Period(7))},
        "windows": {
            "count": Scheduled(shape="step", at=[Period(3), Period(5)], gamma=2.0),
            "ratio": Scheduled(shape="cosine", end=0.1),
        },
        "decaying": {"weight_decay": Scheduled(shape="wsd", end=0.0, decay=0.5)},
    }
    return Cut(), Windows(), Decaying(), Schedules(of=of)


@plugin
class Keep:
    """Keeps a copy of the run's state after every step; another run may begin with one."""

    begin: Any = None

    def __attrs_post_init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    @hookimpl
    def read_checkpoint(self, run: Run) -> Any:
        if run.wanted_checkpoint:
            return self.kept[int(run.wanted_checkpoint)]
        return self.begin

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        self.kept.append(copy.deepcopy(run.snapshot()))


def test_a_run_resumed_anywhere_ends_with_the_same_bits(tiny_run: TinyRun, tmp_path: Path) -> None:
    keep = Keep()
    whole = tiny_run(*many(), keep, length=9, log_every=1, run_dir=tmp_path / "whole")
    for step in (1, 3, 4, 8):
        parts = many()
        begin = Keep(begin=keep.kept[step - 1])
        folder = tmp_path / str(step)
        resumed = tiny_run(*parts, begin, length=9, log_every=1, run_dir=folder)
        assert resumed.history == whole.history[step:]
        assert_same_weights(resumed, whole)


def test_a_rewound_run_uses_the_values_of_the_steps_it_repeats(tiny_run: TinyRun) -> None:
    @plugin
    class GoBack:
        """Goes back once, from step 5 to the state after step 2."""

        done: bool = field(init=False, default=False)

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 5 and not self.done:
                self.done = True
                run.rewind("1")

    cut, windows, decaying, scheduled = many()
    run = tiny_run(cut, windows, decaying, scheduled, Keep(), GoBack(), length=9)
    assert isinstance(windows, Windows)
    assert isinstance(decaying, Decaying)
    counts = [count for count, _ in windows.seen]
    assert counts == [1, 1, 1, 2, 2, 1, 2, 2, 4, 4, 4, 4]
    decays = [decays[0] for decays, _ in decaying.seen]
    assert decays[2:5] == decays[5:8]
    assert run.progress.step == 9


def test_the_order_of_the_plugins_list_does_not_change_the_values(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    runs, seen = [], []
    for turn in range(4):
        parts = list(many())
        windows = parts[1]
        assert isinstance(windows, Windows)
        ordered = parts[turn:] + parts[:turn]
        runs.append(tiny_run(*ordered, length=6, log_every=1, run_dir=tmp_path / str(turn)))
        seen.append(windows.seen)
    assert seen[0] == seen[1] == seen[2] == seen[3]
    for run in runs[1:]:
        assert run.history == runs[0].history
        assert_same_weights(run, runs[0])


def test_a_run_records_its_settings_and_not_their_last_values(tiny_run: TinyRun) -> None:
    windows = Windows()
    run = tiny_run(windows, schedules(windows={"count": Scheduled(end=5)}), length=8)
    assert run.tables["windows"]["count"] == 1
    assert windows.count == 5
    assert "count = 1\n" in (run.folder / "settings.toml").read_text()


def follow(length: str, *plugins: object, **of: dict[str, Scheduled]) -> Schedules:
    """Lay schedules over a run without starting it."""
    made = schedules(**of)
    named = {type(one).__name__.lower(): one for one in (*plugins, made)}
    made.on_run_start(Run(RunSettings(length=Period.parse(length)), named, Path()))
    return made


def course(length: str, **table: Any) -> list[float]:
    """Return what a float setting is at every update of a run of some steps."""
    (one,) = follow(length, Windows(), windows={"ratio": Scheduled(**table)}).scheduled_settings
    return [one.schedule.value(position) for position in range(int(Period.parse(length).amount))]


PLAIN: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"cycle": Period(700), "cycle_growth": 1.5},
    "wsd": {"decay": Period(1500), "decay_shape": "sqrt"},
    "polynomial": {"power": 2.5},
}


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(PLAIN)), st.floats(0.01, 1), st.floats(0.01, 1))
def test_each_shape_scales_the_learning_rates_shape_to_start_and_end(
    shape: Any, start: float, end: float
) -> None:
    schedule = LrSchedule(shape=shape, **PLAIN[shape])
    factors = schedule.prepare(Period(STEPS))
    mine = course(f"{STEPS} steps", shape=shape, start=start, end=end, **PLAIN[shape])
    for position, value in enumerate(mine):
        factor = factors.value(position)
        assert math.isclose(value, end + (start - end) * factor, rel_tol=1e-10), position


@settings(max_examples=15, deadline=None)
@given(st.integers(1, STEPS - 1), st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_warmup_is_linear_from_start_to_peak_and_the_shape_follows(
    warmup: int, start: float, peak: float, end: float
) -> None:
    mine = course(f"{STEPS} steps", start=start, peak=peak, end=end, warmup=Period(warmup))
    for i, value in enumerate(mine):
        x = i / warmup if i < warmup else (i - warmup) / (STEPS - warmup)
        begin, to = (start, peak) if i < warmup else (peak, end)
        assert math.isclose(value, begin * (1 - x) + to * x, rel_tol=1e-10), i


def test_one_cycle_reaches_its_peak_after_the_warmup_and_its_end_at_length() -> None:
    table = {"shape": "one_cycle", "start": 0.95, "peak": 0.85, "end": 0.95}
    (one,) = follow(
        "100 steps", Windows(), windows={"ratio": Scheduled(warmup=Period(30), **table)}
    ).scheduled_settings
    values = [one.schedule.value(at) for at in (0, 15, 30, 65, 100)]
    assert values == pytest.approx([0.95, 0.9, 0.85, 0.9, 0.95])


def test_inverse_sqrt_approaches_its_end() -> None:
    mine = course(
        "1000 steps", shape="inverse_sqrt", start=0.1, peak=0.9, end=0.5, warmup=Period(10)
    )
    assert mine[0] == 0.1
    for i in range(10, 1000):
        assert math.isclose(mine[i], 0.5 + 0.4 * math.sqrt(10 / i))


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16), st.integers(1, STEPS))
def test_integer_settings_are_rounded_to_the_nearest_multiple(
    start: int, end: int, multiple: int, length: int
) -> None:
    low = min(start, end)
    if 2 * low < multiple:  # would become zero
        start, end = start + multiple, end + multiple
    top = 128
    if max(start, end) > top - multiple:
        return
    windows = Windows()
    scheduled = Scheduled(start=start, end=end, multiple_of=multiple, length=Period(length))
    made = follow(f"{length} steps", windows, windows={"count": scheduled})
    run = Run(RunSettings(length=Period(length)), {"windows": windows}, Path())
    for applied in {0, length // 3, length // 2, length - 1, length, length + 7}:
        run.progress = Progress(applied=applied, step=applied + 3)
        made.scheduled_settings[0].update(run)
        wanted = start + (end - start) * min(applied / length, 1)
        assert windows.count % multiple == 0
        assert abs(windows.count - wanted) <= multiple / 2 * (1 + 1e-9)


def test_other_units_are_read_from_the_progress(tiny_run: TinyRun) -> None:
    windows = Windows()
    ramp = Scheduled(shape="step", at=Period(16, "tokens"), gamma=2.0)
    tiny_run(windows, schedules(windows={"count": ramp}), length=3)
    assert [count for count, _ in windows.seen] == [1, 1, 1]  # 4 tokens in a step
    windows = Windows()
    ramp = Scheduled(end=3, length=Period(1, "epochs"))
    tiny_run(windows, schedules(windows={"count": ramp}), length=4)
    assert [count for count, _ in windows.seen] == [1, 2, 3, 3]  # 4, 8, 12 of 16 samples more


def test_a_value_that_grows_too_large_ends_the_run_with_the_step_and_the_reason(
    tiny_run: TinyRun,
) -> None:
    ramp = Scheduled(shape="step", at=Period(8, "tokens"), gamma=8.0)
    with pytest.raises(SettingsError, match=r"step \d: cut.batch_size: batch_size must be <= 64"):
        tiny_run(Cut(), schedules(cut={"batch_size": ramp}), length=8)


@plugin
class Fixed:
    """Says what of it may change."""

    depth: int = 3
    """Read at the start."""
    pace: int = 3
    """Read at every step."""

    changeable = ("pace",)

    @hookimpl
    def on_step_end(self) -> None:
        pass


@plugin
class Idle:
    """Does nothing during the steps."""

    depth: int = 3
    """A number."""

    @hookimpl
    def adapt_model(self) -> None:
        pass


@pytest.mark.parametrize(
    ("where", "table", "complaint"),
    [
        (
            "window.count",
            {},
            "window.count: 'window' is no listed plugin (did you mean 'windows'?)",
        ),
        (
            "windows.cont",
            {},
            "windows.cont: 'cont' is no setting of windows (did you mean 'count'?)",
        ),
        ("windows.label", {}, "windows.label: is not a number"),
        ("cut.shuffle", {}, "cut.shuffle: is not a number"),
        ("cut.opened", {}, "cut.opened: 'opened' is no setting of cut ("),
        ("cut.x", {}, "cut.x: 'x' is no setting of cut (known: batch_size, seed, shuffle)"),
        ("cut.seed", {}, "cut.seed.start: is missing; the table of the plugin has no value"),
        ("windows.count", {"end": 0.4}, "windows.count.end: count must be >= 1"),
        ("windows.count", {"start": 0.0}, "windows.count.start: count must be >= 1"),
        ("windows.count", {"end": 2.0, "multiple_of": 8}, "windows.count.start: count must be >="),
        ("windows.ratio", {"end": 1.5}, "windows.ratio.end: ratio must be <= 1"),
        ("windows.ratio", {"peak": 2.0, "warmup": 0.1}, "windows.ratio.peak: ratio must be <= 1"),
        ("windows.ratio", {"multiple_of": 2}, "windows.ratio.multiple_of: works with integer"),
        (
            "cut.batch_size",
            {"shape": "step", "at": Period(10), "gamma": 2.0, "end": None},
            "cut.batch_size.gamma: batch_size must be <= 64",
        ),
        (
            "cut.batch_size",
            {"shape": "step", "at": [Period(9)] * 5, "gamma": 2.0, "end": None},
            "cut.batch_size.gamma: batch_size must be <= 64",
        ),
        (
            "windows.count",
            {"length": Period(1, "hours"), "warmup": 0.1, "peak": 2.0},
            "windows.count.warmup: is in steps, but length is in seconds",
        ),
        (
            "windows.count",
            {"warmup": Period(100), "peak": 2.0},
            "windows.count.warmup: takes the whole schedule",
        ),
        ("decaying.lr", {}, "decaying.lr: the learning rate follows the plugin lr_schedule"),
        (
            "fixed.depth",
            {},
            "fixed.depth: is read only at the start; settings that may change: pace",
        ),
        ("lrschedule.decay_to", {}, "lrschedule.decay_to: is read only at the start"),
        ("idle.depth", {}, "idle.depth: idle has no hook during steps"),
    ],
)
def test_schedules_that_do_not_fit_are_reported_before_anything_is_built(
    where: str, table: dict[str, Any], complaint: str
) -> None:
    plugins = (Cut(), Windows(), Decaying(), Fixed(), Idle(), LrSchedule())
    name, _, setting = where.partition(".")
    with pytest.raises(SettingsError) as caught:
        follow("100 steps", *plugins, **{name: {setting: Scheduled(**{"end": 1.0, **table})}})
    assert any(f"schedules.of.{complaint}" in text for text in caught.value.problems), caught.value


def test_all_schedules_that_do_not_fit_are_reported_at_once() -> None:
    of = {
        "windows": {"count": Scheduled(end=0), "ratio": Scheduled(end=2)},
        "missing": {"count": Scheduled(end=1)},
    }
    with pytest.raises(SettingsError) as caught:
        follow("100 steps", Windows(), **of)
    assert len(caught.value.problems) == 3


def test_two_schedules_of_one_setting_are_an_error_that_names_both(tiny_run: TinyRun) -> None:
    table = {"of": {"windows": {"count": {"end": 2}}}}
    again = {"plugin": "schedules", **table}
    with pytest.raises(SettingsError) as caught:
        tiny_run("schedules", "again", Windows(), settings={"schedules": table, "again": again})
    assert "schedules.of.windows.count: follows a schedule of again too" in str(caught.value)


def test_a_second_instance_may_schedule_what_the_first_does_not(tiny_run: TinyRun) -> None:
    windows = Windows()
    one = {"of": {"windows": {"count": {"end": 2}}}}
    other = {"plugin": "schedules", "of": {"windows": {"ratio": {"end": 0.25}}}}
    run = tiny_run("schedules", "other", windows, settings={"schedules": one, "other": other})
    assert run.outcome == "finished"
    assert windows.seen == [(1, 0.5), (1, 0.4375), (2, 0.375), (2, 0.3125)]


def test_a_weight_decay_of_zero_cannot_be_scheduled(tiny_run: TinyRun) -> None:
    of = schedules(decaying={"weight_decay": Scheduled(end=0.1)})
    with pytest.raises(SettingsError, match=r"decaying.weight_decay is 0, so no parameter group"):
        tiny_run(Decaying(weight_decay=0.0), of)


def test_a_setting_that_no_parameter_group_has_is_an_error(tiny_run: TinyRun) -> None:
    @plugin
    class Other:
        """An optimizer with a setting of another name."""

        damping: float = 0.5
        """Nothing of PyTorch's."""

        @hookimpl
        def build_optimizer(self, run: Run) -> torch.optim.Optimizer:
            return torch.optim.SGD(run.model.parameters(), 0.1)

    with pytest.raises(SettingsError, match=r"no parameter group of .*SGD.* has damping = 0\.5"):
        tiny_run(Other(), schedules(other={"damping": Scheduled(end=0.1)}))


def test_a_schedule_in_epochs_is_an_error_if_the_data_has_no_epochs(tiny_run: TinyRun) -> None:
    class Endless(Samples):
        epoch_samples = None  # type: ignore[assignment]

    @plugin
    class EndlessData:
        """A source without epochs."""

        @hookimpl
        def build_data(self) -> Any:
            return Endless(Cut())

    ramp = Scheduled(end=2, length=Period(1, "epochs"))
    with pytest.raises(SettingsError, match="windows.count is counted in epochs, but the data"):
        tiny_run(EndlessData(), Windows(), schedules(windows={"count": ramp}))


def test_an_empty_table_is_an_error() -> None:
    tables = {"plugins": ["schedules"], "run": {"length": 10}, "schedules": {"of": {"cut": {}}}}
    with pytest.raises(SettingsError, match="schedules.of: is empty"):
        compose(tables)


def test_the_readme_lists_every_setting_of_a_schedule() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
    lines = text.partition("## schedules")[2].splitlines()
    for name in setting_fields(Scheduled):
        (row,) = [line for line in lines if line.startswith(f"| `{name}` |")]
        assert row.endswith(f"| {attribute_docs(Scheduled)[name]} |")
