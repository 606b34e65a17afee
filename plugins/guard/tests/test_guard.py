"""A step that is not finite is skipped without a trace, or ends the run with what caused it."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fundamentallm import (
    Batch,
    NotFiniteError,
    Progress,
    Rejection,
    Run,
    field,
    hookimpl,
    plugin,
)
from fundamentallm.testing import (
    HostReads,
    PluginContract,
    TinyData,
    TinyRun,
    TinySamples,
    assert_same_weights,
)
from fundamentallm_guard import Guard


class TestContract(PluginContract):
    plugin = Guard
    wrong_settings = (
        ({"nonfinite": "ignore"}, "guard.nonfinite"),
        ({"spike": "stay"}, "guard.spike"),
        ({"spike_window": 4}, "guard.spike_window: must be >= 5"),
        ({"spike_threshold": 0}, "guard.spike_threshold: must be > 0"),
        ({"max_skips": 0}, "guard.max_skips: must be >= 1"),
        ({"max_skips": 1.5}, "guard.max_skips: expected a whole number"),
        ({"max_rewinds": True}, "guard.max_rewinds"),
        ({"oom": "pray"}, "guard.oom"),
    )


@plugin
class Poisoned(TinyData):
    """The tiny samples, some of them multiplied by ``by``, or left out."""

    at: list[int] = field(factory=list)
    by: float = math.nan
    lacking: bool = False

    @hookimpl
    def build_data(self, run: Run) -> Any:
        return PoisonedSamples(self, run.device)


class PoisonedSamples(TinySamples):
    def __init__(self, owner: Poisoned, device: str) -> None:
        super().__init__(owner.batch_size, device)
        self.owner = owner

    def batches(self, progress: Progress) -> Iterator[Batch]:
        for batch in super().batches(progress):
            if not (self.owner.lacking and batch.first in self.owner.at):
                yield batch

    def batch(self, indices: range) -> Batch:
        batch = super().batch(indices)
        if indices[0] in self.owner.at:
            batch.data[0][0] *= self.owner.by
        return batch


@plugin
class Normed:
    """A network with running statistics and dropout."""

    @hookimpl
    def build_model(self) -> nn.Module:
        class Normed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.hidden = nn.Linear(8, 16)
                self.norm = nn.BatchNorm1d(16)
                self.out = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 1))

            def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                return nn.functional.mse_loss(self.out(self.norm(self.hidden(inputs))), targets)

        return Normed()


def test_a_skipped_step_leaves_the_weights_of_a_run_whose_data_lacked_it(
    tiny_run: TinyRun, tmp_path: Any
) -> None:
    skipped = tiny_run(Guard(), Poisoned(at=[12, 20]), length=8)
    lacking = tiny_run(Poisoned(at=[12, 20], lacking=True), length=6, run_dir=tmp_path / "other")
    assert_same_weights(skipped, lacking)
    assert (skipped.progress.step, skipped.progress.applied) == (8, 6)


def test_a_skipped_step_leaves_running_statistics_unchanged(
    tiny_run: TinyRun, tmp_path: Any
) -> None:
    skipped = tiny_run(Guard(), Normed(), Poisoned(at=[12]), length=6)
    lacking = tiny_run(Normed(), Poisoned(at=[12], lacking=True), length=5, run_dir=tmp_path / "o")
    assert_same_weights(skipped, lacking)


def test_a_skipped_step_leaves_no_trace_with_accumulation_clipping_and_a_schedule(
    tiny_run: TinyRun, tmp_path: Any
) -> None:
    names = ["accumulate", "grad_clip", "lr_schedule", "adamw"]
    settings = {
        "accumulate": {"microbatches": 3},
        "grad_clip": {"max_norm": 0.5},
        "lr_schedule": {"warmup": "2 steps", "length": "9 steps"},
    }
    skipped = tiny_run(*names, Guard(), Poisoned(at=[16]), length=6, settings=settings)
    lacking = Poisoned(at=[12, 16, 20], lacking=True)
    other = tiny_run(*names, lacking, length=5, settings=settings, run_dir=tmp_path / "other")
    assert_same_weights(skipped, other)


def test_a_guard_that_finds_nothing_changes_no_bit(tiny_run: TinyRun, tmp_path: Any) -> None:
    plain = tiny_run(Normed(), length=6, run_dir=tmp_path / "plain")
    guard = Guard(spike="skip", spike_window=5, spike_threshold=1e9, oom="split")
    guarded = tiny_run(Normed(), guard, length=6)
    assert_same_weights(plain, guarded)
    assert plain.history == guarded.history


def test_the_message_names_step_data_and_the_first_module(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_run(Guard(), Poisoned(at=[12]), length=5)
    (record,) = [r for r in caplog.records if "guard" not in r.name and "nan" in r.getMessage()]
    assert record.getMessage() == (
        "step 4: the loss is nan (4 samples from index 12 in the order of the data); first module "
        "with a non-finite output: hidden (Linear), whose input is already not finite; the step "
        "is skipped"
    )


@plugin
class Overflowing:
    """A network whose middle layer overflows where the input is 1e30."""

    @hookimpl
    def build_model(self) -> nn.Module:
        class Squared(nn.Module):
            def forward(self, hidden: Tensor) -> Tensor:
                return hidden * hidden

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(8, 4)
                self.middle = nn.Sequential(nn.Dropout(0.5), Squared())
                self.last = nn.Linear(4, 1)

            def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                return nn.functional.mse_loss(self.last(self.middle(self.first(inputs))), targets)

        return Net()


def test_the_first_module_is_that_in_which_the_numbers_become_infinite(tiny_run: TinyRun) -> None:
    with pytest.raises(NotFiniteError) as caught:
        tiny_run(Guard(nonfinite="stop"), Overflowing(), Poisoned(at=[8], by=1e30))
    assert str(caught.value).startswith("step 3: the loss is ")
    assert "first module with a non-finite output: middle.1 (Squared); " in str(caught.value)
    assert str(caught.value).endswith("; guard.nonfinite = 'skip' skips such steps")


def test_a_nonfinite_value_that_a_model_draws_at_random_is_found_when_the_window_is_repeated(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    @plugin
    class Unlucky:
        """A network that draws an infinity in half of its steps."""

        @hookimpl
        def build_model(self) -> nn.Module:
            class Draw(nn.Module):
                def forward(self, loss: Tensor) -> Tensor:
                    return loss / torch.randint(2, ())

            class Net(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.linear = nn.Linear(8, 1)
                    self.draw = Draw()

                def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                    loss = nn.functional.mse_loss(self.linear(inputs), targets)
                    return self.draw(loss) if self.training else loss

            return Net()

    with pytest.raises(NotFiniteError):  # what is put back draws the same again
        tiny_run(Guard(max_skips=3), Unlucky(), length=40)
    assert caplog.text.count("the step is skipped") >= 3
    assert "draw (Draw)" in caplog.text
    assert "when the window is repeated" not in caplog.text


def test_of_several_microbatches_the_message_names_the_one_to_blame(tiny_run: TinyRun) -> None:
    table = {"accumulate": {"microbatches": 3}}
    with pytest.raises(NotFiniteError, match=r"micro-batch 2 of 3: 4 samples from index 16 in"):
        tiny_run("accumulate", Guard(nonfinite="stop"), Poisoned(at=[16]), settings=table)


@plugin
class BadGradient:
    """A network with a finite loss whose gradient is NaN from the second step on."""

    also: str = ""

    @hookimpl
    def build_model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fine = nn.Linear(8, 1)
                self.root = nn.Parameter(torch.ones(3))
                self.factor = 1.0

            def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                loss = nn.functional.mse_loss(self.fine(inputs), targets)
                loss = loss + (self.root * self.factor).sqrt().sum()
                self.factor = 0.0  # the slope of a root at 0 is infinite
                return loss

        return Net()


def test_a_gradient_is_judged_even_if_the_loss_is_finite(tiny_run: TinyRun) -> None:
    with pytest.raises(NotFiniteError) as caught:
        tiny_run(Guard(nonfinite="stop"), BadGradient())
    text = str(caught.value)
    assert text.startswith("step 2: the loss is ")
    assert "but a gradient is nan (4 samples from index 4 in the order of the data); " in text
    assert text.endswith(
        "is finite; first parameter with a non-finite gradient: root; guard.nonfinite = 'skip' "
        "skips such steps"
    )


def test_the_message_names_weights_that_are_not_finite(tiny_run: TinyRun) -> None:
    @plugin
    class Breaks:
        """Breaks a weight."""

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 2:
                with torch.no_grad():
                    run.model.hidden.weight[0, 0] = math.inf

    with pytest.raises(NotFiniteError, match=r"step 3: .*hidden \(Linear\), whose weights are not"):
        tiny_run(Guard(nonfinite="stop"), Breaks())


def test_the_search_for_the_module_leaves_no_trace(tiny_run: TinyRun) -> None:
    run = tiny_run(Guard(), Poisoned(at=[4]), length=2)
    assert not [hook for module in run.model.modules() for hook in module._forward_hooks]
    assert run.weight == 1.0
    assert all(math.isfinite(row["train/loss"]) for row in run.history)


def test_more_than_max_skips_consecutive_steps_end_the_run(
    tiny_run: TinyRun, tmp_path: Any
) -> None:
    bad = [4, 8, 16, 20]
    assert tiny_run(Guard(max_skips=2), Poisoned(at=bad), length=8).progress.applied == 4
    with pytest.raises(NotFiniteError, match=r"^step 4: .*index 12.*; the 2 steps before it were"):
        tiny_run(Guard(max_skips=2), Poisoned(at=[4, 8, 12]), run_dir=tmp_path / "other")


def test_a_resumed_run_continues_the_count_of_skipped_steps(tiny_run: TinyRun) -> None:
    @plugin
    class Stops:
        """Stops the run after step 3."""

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 3:
                run.stop("enough for now")

    bad = [4, 8, 12]
    tiny_run("checkpoint", Guard(max_skips=2), Poisoned(at=bad), Stops(), length=8)
    guard = Guard(max_skips=2)
    with pytest.raises(NotFiniteError, match=r"^step 4: .*the 2 steps before it were"):
        tiny_run("checkpoint", guard, Poisoned(at=bad), length=8)
    assert guard.skipped == 2


def test_the_skipped_steps_are_counted_in_the_rows(tiny_run: TinyRun) -> None:
    run = tiny_run(Guard(), Poisoned(at=[8, 20]), length=7)
    counts = {row["step"]: row.get("guard/skipped") for row in run.history}
    assert counts == {2: None, 4: 1, 6: 2, 7: 2}


@plugin
class Scales:
    """Rejects steps like a loss scaler whose scale is too large for the gradients."""

    every: int = 1
    loss_too: bool = False

    @hookimpl
    def finish_gradients(self, run: Run) -> None:
        if run.progress.step % self.every == 0:
            for parameter in run.parameters:
                parameter.grad *= math.inf

    @hookimpl
    def judge_step(self, run: Run) -> Rejection | None:
        overflowed = run.progress.step % self.every == 0
        return Rejection("overflow", "too large") if overflowed else None


def test_an_overflow_that_another_plugin_handles_is_not_counted_as_a_skip(
    tiny_run: TinyRun, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = tiny_run(Scales(every=2), length=8, run_dir=tmp_path / "plain")
    guard = Guard(max_skips=1)
    guarded = tiny_run(guard, Scales(every=2), length=8)
    assert_same_weights(plain, guarded)
    assert plain.history == guarded.history
    tiny_run(Guard(nonfinite="stop"), Scales(), length=20, run_dir=tmp_path / "all")
    assert not [r for r in caplog.records if "is skipped" in r.getMessage()]


def test_a_nonfinite_loss_is_the_guards_even_if_another_plugin_rejects_the_step(
    tiny_run: TinyRun,
) -> None:
    with pytest.raises(NotFiniteError, match="step 3: the loss is nan"):
        tiny_run(Guard(nonfinite="stop"), Scales(), Poisoned(at=[8]))


def test_fp16_backs_off_as_it_does_without_a_guard(tiny_run: TinyRun, tmp_path: Any) -> None:
    table = {"amp": {"dtype": "fp16", "init_scale": 2.0**40, "growth_interval": 4}}
    plain = tiny_run("amp", settings=table, length=30, run_dir=tmp_path / "plain")
    guard = Guard(nonfinite="stop")
    guarded = tiny_run("amp", guard, settings=table, length=30)
    assert 0 < plain.progress.applied < 30
    assert_same_weights(plain, guarded)


def test_skipped_data_do_not_change_the_loss_scale(tiny_run: TinyRun, tmp_path: Any) -> None:
    table = {"amp": {"dtype": "fp16", "init_scale": 2.0**40, "growth_interval": 4}}
    bad = [8 * n for n in range(10, 20)]  # every second window from the 21st on
    skipped = tiny_run("amp", Guard(), Poisoned(at=bad), settings=table, length=60)
    lacking = Poisoned(at=bad, lacking=True)
    other = tiny_run("amp", lacking, settings=table, length=50, run_dir=tmp_path / "other")
    assert_same_weights(skipped, other)
    states = [run.snapshot()["plugins"]["amp"] for run in (skipped, other)]
    assert states[0] == states[1]
    assert states[0]["overflows"] > 0


def test_two_guards_do_not_leave_a_bad_gradient_to_each_other(tiny_run: TinyRun) -> None:
    @plugin
    class Second(Guard):
        """Another."""

    with pytest.raises(NotFiniteError, match="step 2: .*but a gradient is nan"):
        tiny_run(Guard(nonfinite="stop"), Second(), BadGradient())


@pytest.mark.parametrize("value", [1e19, 3e38])
def test_gradients_that_are_large_but_finite_are_accepted(tiny_run: TinyRun, value: float) -> None:
    @plugin
    class Large:
        """Makes gradients that no sum of squares could hold."""

        @hookimpl
        def finish_gradients(self, run: Run) -> None:
            for parameter in run.parameters:
                parameter.grad.fill_(value)

    assert tiny_run(Guard(nonfinite="stop"), Large()).progress.applied == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_value_in_any_gradient_is_found(tiny_run: TinyRun, bad: float) -> None:
    @plugin
    class Spoils:
        """Spoils one gradient in each step."""

        @hookimpl
        def finish_gradients(self, run: Run) -> None:
            run.parameters[run.progress.step].grad.view(-1)[-1] = bad

    assert tiny_run(Guard(), Spoils(), length=4).progress.applied == 0


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_complex_gradients_are_judged(tiny_run: TinyRun, bad: float) -> None:
    @plugin
    class Turns:
        """Also trains a complex number, whose gradient may be spoilt in the third step."""

        @hookimpl(wrapper=True)
        def build_model(self) -> Generator[None, nn.Module, nn.Module]:
            model = yield
            model.turn = nn.Parameter(torch.ones((), dtype=torch.complex64))
            return model

        @hookimpl(wrapper=True)
        def forward(self, run: Run) -> Generator[None, Tensor, Tensor]:
            return (yield) + run.model.turn.abs()

        @hookimpl
        def finish_gradients(self, run: Run) -> None:
            if run.progress.step == 2:
                run.model.turn.grad += bad

    assert tiny_run(Guard(), Turns(), length=4).progress.applied == (3 if bad != bad else 4)


@pytest.mark.parametrize(
    ("guard", "reads"),
    [
        (Guard(), 1),
        (Guard(spike="skip", spike_window=5), 1),
        (Guard(nonfinite="off", spike="off", oom="skip"), 0),
    ],
)
def test_a_step_reads_the_device_once_or_not_at_all(
    tiny_run: TinyRun, guard: Guard, reads: int
) -> None:
    run = tiny_run("accumulate", guard, settings={"accumulate": {"microbatches": 2}}, length=8)
    with HostReads() as mode:
        guard.on_step_start()
        assert guard.judge_step(run) is None
        guard.settle_step(run, applied=True)
    assert mode.count == reads


def test_the_step_after_a_bad_one_takes_the_quick_check(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = Guard()
    run = tiny_run(guard, Poisoned(at=[12]), length=8)
    assert guard.skipped == 1
    monkeypatch.setattr(Tensor, "tolist", None)  # by which all values are read
    with HostReads() as mode:
        assert guard.judge_step(run) is None
    assert mode.count == 1
