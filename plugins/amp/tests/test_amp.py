"""Half precision in forward passes, and a loss scale that is bit-identical to PyTorch's."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fundamentallm import (
    Batch,
    NotFiniteError,
    Rejection,
    Run,
    RunSettings,
    SettingsError,
    compose,
    field,
    hookimpl,
    plugin,
)
from fundamentallm.testing import HostReads, PluginContract, TinyRun, assert_same_weights
from fundamentallm_amp import Amp
from fundamentallm_amp.loss_scale import LossScale
from fundamentallm_amp.precision import check_device, convert_to_bf16

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Of a run on what happens to be the test's machine.
ABSENT = [
    name
    for name, there in (
        ("cuda", torch.cuda.is_available()),
        ("mps", torch.backends.mps.is_available()),
    )
    if not there
]


class TestContract(PluginContract):
    plugin = Amp
    wrong_settings = (
        ({"dtype": "float16"}, "amp.dtype: unknown value"),
        ({"params": "fp16"}, "amp.params: "),
        ({"dtype": "fp16", "params": "bf16"}, "amp.params: weights in bf16 need dtype 'bf16'"),
        ({"dtype": "tf32", "params": "bf16"}, "amp.params: weights in bf16 need dtype 'bf16'"),
        ({"dtype": "tf32", "init_scale": 4.0}, "amp.init_scale: belongs to dtype 'fp16'"),
        ({"init_scale": 4.0}, "amp.init_scale: belongs to dtype 'fp16', but dtype is 'bf16'"),
        ({"growth_interval": 5}, "amp.growth_interval: belongs to dtype 'fp16'"),
        ({"dtype": "fp16", "init_scale": 0.0}, "amp.init_scale: must be > 0"),
        ({"dtype": "fp16", "init_scale": math.inf}, "amp.init_scale: must be <="),
        ({"dtype": "fp16", "init_scale": math.nan}, "amp.init_scale: must be"),
        ({"dtype": "fp16", "init_scale": 0.5}, "amp.min_scale: must not exceed init_scale, 0.5"),
        ({"dtype": "fp16", "growth_factor": 1.0}, "amp.growth_factor: must be > 1"),
        ({"dtype": "fp16", "backoff_factor": 1.0}, "amp.backoff_factor: must be < 1"),
        ({"dtype": "fp16", "backoff_factor": 0.0}, "amp.backoff_factor: must be > 0"),
        ({"dtype": "fp16", "growth_interval": 0}, "amp.growth_interval: must be >= 1"),
        ({"dtype": "fp16", "growth_interval": 2.0}, "amp.growth_interval: expected a whole"),
        ({"dtype": "fp16", "min_scale": -1.0}, "amp.min_scale: must be > 0"),
    )


class TestContractWithFp16(PluginContract):
    plugin = Amp
    needs = {"dtype": "fp16"}

    def test_builds_from_an_empty_table_or_names_what_it_needs(self) -> None:
        compose_amp()


def compose_amp(**table: Any) -> Amp:
    """Build the plugin from a table, as a settings file does."""
    parts = [Boosted()]
    composed = compose(
        {"plugins": ["amp", "adamw"], "run": {"length": 1}, "amp": table}, plugins=parts
    )
    found = composed.plugins["amp"]
    assert isinstance(found, Amp)
    return found


class Network(nn.Module):
    """Two layers; the loss is multiplied by what comes with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 8)
        self.out = nn.Linear(8, 1)
        self.register_buffer("angles", torch.linspace(0, 1, 8))
        self.seen: list[tuple[bool, torch.dtype]] = []

    def forward(self, inputs: Tensor, boost: Tensor) -> Tensor:
        hidden = self.hidden(inputs)
        self.seen.append((self.training, hidden.dtype))
        return self.out(hidden * self.angles).float().square().mean() * boost


@plugin
class Boosted:
    """A small network, and data that make its loss as large as ``boosts`` say, step by step."""

    boosts: list[float] = field(factory=list)
    """The factors of the first steps; 1 in later ones."""
    broken: bool = False
    """Whether a weight is in fp16."""

    @hookimpl
    def build_data(self) -> Boosted:
        return self

    @hookimpl
    def build_model(self) -> nn.Module:
        return Network().half() if self.broken else Network()

    epoch_samples = None
    fingerprint = "boosted"

    def batches(self, progress: Any) -> Iterator[Batch]:
        step = progress.step
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> Batch:
        inputs = torch.sin(torch.arange(8.0).view(2, 4) + step)
        boost = self.boosts[step] if step < len(self.boosts) else 1.0
        return Batch((inputs, torch.tensor(boost)), 2, 2, 2, first=2 * step)

    def validation(self) -> dict[str, list[Batch]]:
        return {"val": [self.batch(1000)]}


@plugin
class Resume:
    """Keeps a copy of the run's state after step ``at``, or begins with one."""

    at: int = 3
    begin: Any = None
    kept: Any = None

    @hookimpl
    def read_checkpoint(self, run: Run) -> dict[str, Any] | None:
        return copy.deepcopy(self.kept if run.wanted_checkpoint else self.begin)

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if run.progress.step == self.at:
            self.kept = copy.deepcopy(run.snapshot())


OVERFLOW = 1e30


def column(run: Run, name: str) -> list[float]:
    return [row[name] for row in run.history if name in row]


# ---------------------------------------------------------------------------------------------
# Where it computes in half precision


@pytest.mark.parametrize("dtype", HALVES)
def test_training_and_validation_compute_in_half_precision_and_nothing_else_does(
    tiny_run: TinyRun, dtype: Any
) -> None:
    @plugin
    class Outside:
        """Records whether autocast is on where it should not be."""

        found: list[bool] = field(factory=list)

        @hookimpl
        def edit_gradients(self, run: Run) -> None:
            self.found.append(torch.is_autocast_enabled("cpu"))
            assert {p.grad.dtype for p in run.parameters if p.grad is not None} == {torch.float32}

        @hookimpl
        def on_validation_end(self) -> None:
            self.found.append(torch.is_autocast_enabled("cpu"))

    outside = Outside()
    run = tiny_run(Amp(dtype=dtype), Boosted(), outside, validate_every=2)
    assert run.model.seen.count((True, HALVES[dtype])) == 4
    assert run.model.seen.count((False, HALVES[dtype])) == 2
    assert len(run.model.seen) == 6
    assert outside.found == [False] * 6
    assert {p.dtype for p in run.parameters} == {torch.float32}


@plugin
class Precisions:
    """Records torch's precision of fp32 matrix products in each step, and may fail."""

    fails: bool = False
    found: list[str] = field(factory=list)

    @hookimpl
    def on_step_end(self) -> None:
        self.found.append(torch.get_float32_matmul_precision())
        if self.fails:
            raise SettingsError("no further step")


@pytest.mark.parametrize("before", ["highest", "medium"])
@pytest.mark.parametrize("fails", [False, True])
def test_tf32_lasts_as_long_as_the_run(tiny_run: TinyRun, before: str, fails: bool) -> None:
    torch.set_float32_matmul_precision(before)
    precisions = Precisions(fails=fails)
    try:
        if fails:
            with pytest.raises(SettingsError, match="no further step"):
                tiny_run(Amp(dtype="tf32"), Boosted(), precisions, length=2)
        else:
            tiny_run(Amp(dtype="tf32"), Boosted(), precisions, length=2)
        assert set(precisions.found) == {"high"}
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_other_types_leave_the_precision_of_fp32_alone(tiny_run: TinyRun) -> None:
    precisions = Precisions()
    tiny_run(Amp(), Boosted(), precisions, length=2)
    assert precisions.found == ["highest"] * 2


def test_with_tf32_all_tensors_are_in_fp32_and_a_cpu_computes_as_without_it(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    plain = tiny_run(Boosted(), run_dir=tmp_path / "plain")
    run = tiny_run(Amp(dtype="tf32"), Boosted(), validate_every=2)
    assert {dtype for _, dtype in run.model.seen} == {torch.float32}
    assert_same_weights(plain, run)


def test_autocast_ends_after_a_failed_forward(tiny_run: TinyRun) -> None:
    @plugin
    class Broken:
        """Answers with an error."""

        @hookimpl
        def forward(self) -> Tensor:
            assert torch.is_autocast_enabled("cpu")
            raise SettingsError("no forward today")

    with pytest.raises(SettingsError, match="no forward today"):
        tiny_run(Amp(), Broken())
    assert not torch.is_autocast_enabled("cpu")


def test_bf16_weights_have_bf16_gradients_and_optimizer_state(
    tiny_run: TinyRun,
) -> None:
    run = tiny_run(Amp(params="bf16"), Boosted(), validate_every=2)
    kinds = {p.dtype for p in run.parameters} | {p.grad.dtype for p in run.parameters}
    states = run.optimizer.state.values()
    kinds |= {state[key].dtype for state in states for key in ("exp_avg", "exp_avg_sq")}
    assert kinds == {torch.bfloat16}
    assert run.model.angles.dtype is torch.float32
    assert all(math.isfinite(loss) for loss in column(run, "val/loss"))
    assert len(column(run, "val/loss")) == 2


def test_only_floating_point_weights_become_bf16_and_shared_ones_stay_shared() -> None:
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    model["other"].weight = model["one"].weight
    whole = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    model.register_parameter("count", whole)
    before = model["one"].weight.detach().clone()
    convert_to_bf16(model)
    assert model["one"].weight is model["other"].weight
    assert model["one"].weight.equal(before.bfloat16())
    assert model["one"].weight.requires_grad
    assert model.get_parameter("count").dtype is torch.int64


@pytest.mark.parametrize("table", [{"params": "bf16"}, {"dtype": "fp16", "growth_interval": 2}])
def test_a_resumed_run_ends_in_the_same_bits(
    tiny_run: TinyRun, tmp_path: Path, table: dict[str, Any]
) -> None:
    boosts = [1.0, OVERFLOW, 1.0, 1.0, 1.0, OVERFLOW]
    whole = Resume()
    parts = lambda resume: (Amp(**table), Boosted(boosts=boosts), resume)  # noqa: E731
    one = tiny_run(*parts(whole), length=9, log_every=1, run_dir=tmp_path / "one")
    other = tiny_run(
        *parts(Resume(begin=whole.kept)), length=9, log_every=1, run_dir=tmp_path / "other"
    )
    assert_same_weights(one, other)
    assert other.history == one.history[3:]
    assert repr(other.snapshot()["optimizer"]) == repr(one.snapshot()["optimizer"])


# ---------------------------------------------------------------------------------------------
# The loss scale


def test_an_overflowing_step_is_rejected_with_its_cause_and_changes_no_weight(
    tiny_run: TinyRun,
) -> None:
    reasons = []

    @plugin
    class Watch:
        """Records why steps are rejected."""

        @hookimpl
        def settle_step(self, run: Run, applied: bool) -> None:
            reasons.append((applied, run.rejected))
            if not applied:
                assert not run.optimizer.state, "no update was made yet"

    boosted = Boosted(boosts=[OVERFLOW, OVERFLOW])
    run = tiny_run(Amp(dtype="fp16"), boosted, Watch(), log_every=1)
    overflow = [Rejection("overflow", "the gradients overflowed in fp16")]
    assert reasons == [(False, overflow), (False, overflow), (True, []), (True, [])]
    assert (run.progress.step, run.progress.applied) == (4, 2)
    assert column(run, "amp/scale") == [2.0**15, 2.0**14, 2.0**14, 2.0**14]
    assert column(run, "amp/overflows") == [1, 2, 2, 2]
    assert len(column(run, "train/loss")) == 2


def test_every_row_and_the_last_one_has_the_current_scale(tiny_run: TinyRun) -> None:
    boosts = [OVERFLOW, 1.0, 1.0, OVERFLOW, OVERFLOW]
    run = tiny_run(Amp(dtype="fp16"), Boosted(boosts=boosts), length=5, log_every=3)
    assert [row["step"] for row in run.history] == [3, 5]
    assert column(run, "amp/scale") == [2.0**15, 2.0**13]
    assert column(run, "amp/overflows") == [1, 3]


def test_bf16_logs_nothing_and_rejects_nothing(tiny_run: TinyRun) -> None:
    run = tiny_run(Amp(), Boosted(), log_every=1)
    assert not [name for row in run.history for name in row if name.startswith("amp/")]
    assert run.progress.applied == 4
    with pytest.raises(SettingsError, match="nothing listed produces 'amp/scale'"):
        watching(Amp())
    watching(Amp(dtype="fp16"))


def watching(amp: Amp) -> None:
    """Compose a run with a plugin that watches the scale."""

    @plugin
    class Watcher:
        """Watches a metric."""

        monitor: str = "amp/scale"

        @hookimpl
        def on_log(self) -> None: ...

    compose({"plugins": ["adamw"], "run": {"length": 1}}, plugins=[amp, Boosted(), Watcher()])


def test_all_other_hooks_see_unscaled_gradients(tiny_run: TinyRun, tmp_path: Path) -> None:
    @plugin
    class Witness:
        """Records the gradients when they are judged, edited and at the end of the step."""

        seen: list[list[Tensor]] = field(factory=list)

        def note(self, run: Run) -> None:
            self.seen.append([p.grad.clone() for p in run.parameters if p.grad is not None])

        judge_step = hookimpl(note, specname="judge_step")
        edit_gradients = hookimpl(lambda self, run: self.note(run), specname="edit_gradients")
        on_step_end = hookimpl(lambda self, run: self.note(run), specname="on_step_end")

    found = []
    for scale in (1.0, 1024.0):
        for amp_first in (True, False):
            witness, amp = Witness(), Amp(dtype="fp16", init_scale=scale)
            listed = (amp, witness) if amp_first else (witness, amp)
            folder = tmp_path / f"{scale}-{amp_first}"
            tiny_run(*listed, Boosted(), length=1, run_dir=folder)
            found += witness.seen
    for one in found:
        torch.testing.assert_close(one, found[0], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("cause", "scales"),
    [
        ("spike", [4.0, 4.0, 8.0, 8.0, 8.0, 8.0]),
        ("nonfinite_loss", [4.0, 4.0, 8.0, 8.0, 8.0, 8.0]),
        ("nonfinite_gradient", [4.0, 8.0, 8.0, 16.0, 16.0, 32.0]),
    ],
)
def test_a_step_that_another_plugin_rejects_counts_for_the_scale_only_if_its_gradients_are_the_cause(
    tiny_run: TinyRun, cause: str, scales: list[float]
) -> None:
    @plugin
    class Guard:
        """Rejects every second step."""

        cause: Any

        @hookimpl
        def judge_step(self, run: Run) -> Rejection | None:
            # The text must not decide.
            text = "every second one, whatever its gradient"
            return Rejection(self.cause, text) if run.progress.step % 2 else None

    amp = Amp(dtype="fp16", init_scale=4.0, growth_interval=2)
    run = tiny_run(amp, Guard(cause=cause), Boosted(), length=6, log_every=1)
    assert column(run, "amp/scale") == scales
    assert column(run, "amp/overflows") == [0] * 6
    assert run.progress.applied == 3


def test_a_window_without_gradients_does_not_change_the_scale(tiny_run: TinyRun) -> None:
    @plugin
    class Drop:
        """Forgets the gradients of the second step, and never begins the third."""

        @hookimpl
        def train_microbatch(self, run: Run, batch: Batch, share: float) -> bool:
            if run.progress.step == 2:
                run.losses.append(torch.zeros(()))
                return True
            loss = run.hook.forward(run=run, batch=batch)
            run.losses.append(loss.detach())
            run.hook.backward(run=run, loss=loss * share)
            if run.progress.step == 1:
                for parameter in run.parameters:
                    parameter.grad = None
            return True

    amp = Amp(dtype="fp16", init_scale=4.0, growth_interval=1)
    run = tiny_run(amp, Drop(), Boosted(), length=4, log_every=1)
    assert column(run, "amp/scale") == [8.0, 8.0, 8.0, 16.0]


def test_gradients_that_were_not_scaled_are_an_error(tiny_run: TinyRun) -> None:
    @plugin
    class Own:
        """Backpropagates by itself."""

        @hookimpl
        def train_microbatch(self, run: Run, batch: Batch, share: float) -> bool:
            loss = run.hook.forward(run=run, batch=batch)
            run.losses.append(loss.detach())
            (loss * share).backward()
            return True

    with pytest.raises(SettingsError, match="amp.dtype: 'fp16' needs every loss to go through"):
        tiny_run(Amp(dtype="fp16"), Own(), Boosted())


def test_a_rewind_restores_the_scale_of_that_step(tiny_run: TinyRun) -> None:
    @plugin
    class Back:
        """Goes back once."""

        done: bool = False

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 5 and not self.done:
                self.done = True
                run.rewind("latest")

    boosts = [OVERFLOW, 1.0, 1.0, OVERFLOW, OVERFLOW]
    amp, resume = Amp(dtype="fp16"), Resume(at=2)
    run = tiny_run(amp, Boosted(boosts=boosts), resume, Back(), length=3, log_every=1)
    assert run.progress.step == 3
    run = tiny_run(
        Amp(dtype="fp16"),
        Boosted(boosts=boosts),
        Resume(at=2),
        Back(),
        length=7,
        log_every=1,
        run_dir=run.folder.with_name("other"),
    )
    assert column(run, "amp/scale")[:3] == [2.0**15, 2.0**15, 2.0**15]
    assert column(run, "amp/overflows")[:3] == [1, 1, 1]


def test_a_second_run_of_the_same_object_starts_with_a_new_scale(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    kept = Resume()
    boosts = [OVERFLOW, 1.0]
    tiny_run(Amp(dtype="fp16"), Boosted(boosts=boosts), kept, run_dir=tmp_path / "kept")
    amp = Amp(dtype="fp16", init_scale=4.0)
    tiny_run(amp, Boosted(), Resume(begin=kept.kept), length=8, run_dir=tmp_path / "resumed")
    assert amp.overflows == 1
    run = tiny_run(amp, Boosted(), length=2, log_every=1, run_dir=tmp_path / "fresh")
    assert column(run, "amp/scale") == [4.0, 4.0]
    assert column(run, "amp/overflows") == [0, 0]


def test_a_resumed_run_continues_the_scale_with_the_growth_rule_of_its_settings(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    kept = Resume()
    first = Amp(dtype="fp16", init_scale=64.0, growth_interval=2)
    tiny_run(first, Boosted(), kept, run_dir=tmp_path / "one")
    assert kept.kept["plugins"]["amp"] == {"overflows": 0, "scale": 128.0, "growth_tracker": 1}
    changed = Amp(dtype="fp16", init_scale=2.0, growth_interval=3, growth_factor=4.0)
    run = tiny_run(
        changed, Boosted(), Resume(begin=kept.kept), length=8, log_every=1, run_dir=tmp_path / "b"
    )
    assert column(run, "amp/scale") == [128.0, 512.0, 512.0, 512.0, 2048.0]


@pytest.mark.parametrize(("before", "after"), [("bf16", "fp16"), ("fp16", "bf16")])
def test_a_resumed_run_may_have_another_precision(
    tiny_run: TinyRun, tmp_path: Path, before: Any, after: Any
) -> None:
    kept = Resume()
    tiny_run(
        Amp(dtype=before),
        Boosted(boosts=[OVERFLOW] * (before == "fp16")),
        kept,
        run_dir=tmp_path / "one",
    )
    run = tiny_run(
        Amp(dtype=after), Boosted(), Resume(begin=kept.kept), log_every=1, run_dir=tmp_path / "b"
    )
    assert column(run, "amp/scale") == ([65536.0] if after == "fp16" else [])
    assert ("amp" in run.snapshot()["plugins"]) == (after == "fp16")


@pytest.mark.parametrize(
    ("boost", "reason"),
    [
        (
            OVERFLOW,
            "the loss is .*e.29, but the gradient of hidden.weight is not finite, and those",
        ),
        (math.nan, "the loss itself is nan: look at the data and the model"),
        (math.inf, "the loss itself is inf: look at the data and the model"),
    ],
)
def test_a_scale_below_the_minimum_ends_the_run_with_the_reason(
    tiny_run: TinyRun, boost: float, reason: str
) -> None:
    boosted = Boosted(boosts=[1.0, *[boost] * 50])
    with pytest.raises(NotFiniteError, match=reason) as caught:
        tiny_run(Amp(dtype="fp16"), boosted, length=50)
    assert str(caught.value).startswith(
        "step 18: the gradients overflow in fp16 at every loss scale; it is down to "
        "0.5 (amp.min_scale is 1)"
    )


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.lists(st.sampled_from([1.0, 3.0, 1e-30, 1e38, math.nan]), max_size=3), max_size=10
    ),
    init_scale=st.sampled_from([2.0**16, 3.0, 1e-3, 2.0**126]),
    growth_factor=st.floats(1.0, 10.0, exclude_min=True),
    backoff_factor=st.floats(0.01, 1.0, exclude_max=True),
    growth_interval=st.integers(1, 4),
    resume=st.integers(0, 5),
)
def test_the_scale_follows_a_gradscaler_with_an_optimizer_for_any_losses(
    steps: list[list[float]], resume: int, **rule: Any
) -> None:
    hand, mine = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = torch.optim.SGD([hand], lr=0.1)
    theirs = torch.amp.GradScaler("cpu", **rule)
    ours = LossScale(torch.amp.GradScaler("cpu", **rule), [mine], "cpu")
    for step, slopes in enumerate(steps):
        hand.grad = mine.grad = None
        for slope in slopes:
            theirs.scale((hand * slope).sum()).backward()
            ours.backward((mine * slope).sum())
        if slopes:
            theirs.unscale_(optimizer)
        assert ours.unscale()
        assert (mine.grad is None) == (hand.grad is None)
        assert repr(mine.grad) == repr(hand.grad)
        overflowed = ours.overflows()
        if slopes:
            theirs.step(optimizer)
            theirs.update()
            finite = hand.grad is not None and bool(hand.grad.isfinite().all())
            assert overflowed != finite
        else:
            assert not overflowed
        assert ours.settle() == overflowed
        assert ours.scale().equal(torch.tensor(theirs.get_scale()))
        if step == resume:
            kept = ours.state()
            ours = LossScale(torch.amp.GradScaler("cpu", **rule), [mine], "cpu")
            ours.restore(kept)


# ---------------------------------------------------------------------------------------------
# Errors at the start


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("device", [*ABSENT, "meta"])
def test_a_device_that_does_not_support_the_type_is_an_error_at_the_start(
    device: str, dtype: Any
) -> None:
    amp = Amp(dtype=dtype)
    run = Run(RunSettings(length=1), {"adamw": Boosted(), "half": amp}, Path())
    run.device = device
    with pytest.raises(SettingsError) as caught:
        amp.on_run_start(run)
    (text,) = caught.value.problems
    assert text.startswith(f"half.dtype: {dtype!r} does not work on this {device} device: ")
    assert text.endswith("or remove the plugin")
    assert "\n" not in text


@pytest.mark.parametrize("dtype", HALVES)
def test_checking_a_device_draws_no_random_number(dtype: str) -> None:
    before = torch.get_rng_state()
    check_device("cpu", dtype)
    assert torch.get_rng_state().equal(before)
    assert not torch.is_autocast_enabled("cpu")


def test_weights_in_fp16_are_an_error_before_the_first_step(tiny_run: TinyRun) -> None:
    with pytest.raises(SettingsError, match=r"amp\.dtype: .* the model has hidden\.weight in fp16"):
        tiny_run(Amp(dtype="fp16"), Boosted(broken=True))


def test_two_instances_are_an_error() -> None:
    tables = {"more": {"plugin": "amp", "dtype": "fp16"}, "run": {"length": 1}}
    with pytest.raises(SettingsError, match="backward: amp .* and more .* both answer"):
        compose({"plugins": ["amp", "more", "adamw"], **tables}, plugins=[Boosted()])


# ---------------------------------------------------------------------------------------------
# What a step costs


@plugin
class Descent:
    """Plain gradient descent, which reads no device value."""

    @hookimpl
    def build_optimizer(self, run: Run) -> torch.optim.Optimizer:
        return torch.optim.SGD(run.model.parameters(), lr=0.01)


@plugin
class Between:
    """Switches something on after one step, and off after another."""

    first: int
    last: int
    start: Any
    stop: Any

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if run.progress.step == self.first:
            self.start()
        if run.progress.step == self.last:
            self.stop()


@pytest.mark.parametrize(("dtype", "reads"), [("bf16", 0), ("fp16", 1)])
def test_only_fp16_makes_the_host_wait_once_per_step(
    tiny_run: TinyRun, dtype: Any, reads: int
) -> None:
    counter = HostReads()
    between = Between(first=4, last=8, start=counter.start, stop=counter.stop)
    amp = Amp(dtype=dtype)
    tiny_run(amp, Boosted(), Descent(), between, length=9, log_every=100)
    assert counter.count == 4 * reads


def calls(tiny_run: TinyRun, folder: Path, *plugins: object) -> float:
    """Return the Python calls in a step."""
    found = 0

    def count(frame: object, event: str, _: object) -> None:
        nonlocal found
        found += event == "call"

    start: Callable[[], None] = lambda: sys.setprofile(count)  # noqa: E731
    between = Between(first=4, last=8, start=start, stop=lambda: sys.setprofile(None))
    tiny_run(*plugins, Boosted(), Descent(), between, length=9, log_every=100, run_dir=folder)
    return found / 4


def test_bf16_adds_few_python_calls_to_those_of_autocast(tiny_run: TinyRun, tmp_path: Path) -> None:
    @plugin
    class Plain:
        """Enters autocast with nothing around it."""

        @hookimpl
        def forward(self, run: Run, batch: Batch) -> Tensor:
            with inside:
                return run.module(*batch.data)

    inside = torch.autocast("cpu", dtype=torch.bfloat16)
    plain = calls(tiny_run, tmp_path / "plain", Plain())
    assert calls(tiny_run, tmp_path / "amp", Amp()) - plain <= 17
