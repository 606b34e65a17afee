"""What the loop promises: windows weigh right, steps settle, runs stop, nothing leaks."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fundamentallm import (
    Batch,
    NotFiniteError,
    OutOfMemoryError,
    Period,
    PluginError,
    Rejection,
    SettingsError,
    hookimpl,
    plugin,
    ran_out_of_memory,
)
from fundamentallm.testing import Recorder, TinyData, TinySamples, assert_same_weights, weights


@plugin
class Stops:
    """Ask for the end once a step is reached."""

    at: int = 2
    where: str = "on_step_end"

    def ask(self, run, hook):
        if hook == self.where and run.progress.step == self.at:
            run.stop("enough")

    @hookimpl
    def on_step_end(self, run):
        self.ask(run, "on_step_end")

    @hookimpl
    def on_validation_end(self, run):
        self.ask(run, "on_validation_end")

    @hookimpl
    def on_safe_point(self, run):
        self.ask(run, "on_safe_point")


def test_a_stop_takes_effect_at_the_safe_point_of_its_step_and_is_validated(tiny_run):
    run = tiny_run(Stops(at=2), length=9)
    assert (run.progress.step, run.outcome, run.stop_reason) == (2, "stopped", "enough")
    assert "val/loss" in run.history[-1]


def test_a_stop_asked_for_by_a_validation_ends_the_same_step(tiny_run):
    run = tiny_run(Stops(at=3, where="on_validation_end"), length=9, validate_every=3)
    assert run.progress.step == 3
    assert sum("val/loss" in row for row in run.history) == 1


def test_a_stop_asked_for_at_a_safe_point_takes_effect_at_the_next(tiny_run):
    run = tiny_run(Stops(at=2, where="on_safe_point"), length=9)
    assert run.progress.step == 3
    assert "val/loss" in run.history[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_at_the_next_safe_point_without_a_validation(tiny_run, number):
    @plugin
    class Sends:
        endings = ()

        @hookimpl
        def forward(self, run, batch):
            if run.progress.step == 2 and run.phase == "train":
                os.kill(os.getpid(), number)
            return run.module(*batch.data)

        @hookimpl
        def on_safe_point(self, run):
            self.endings = (*self.endings, run.ending)

    before = signal.getsignal(number)
    sends = Sends()
    run = tiny_run(sends, length=9)
    assert (run.outcome, run.signal, run.progress.step) == ("interrupted", number, 3)
    assert sends.endings == (False, False, True)
    assert not any("val/loss" in row for row in run.history)
    assert signal.getsignal(number) is before


@plugin
class SendsAt:
    """Send SIGTERM in the forward pass of a step, or in the validation after it."""

    step: int
    phase: str = "train"

    @hookimpl
    def forward(self, run, batch):
        if (run.progress.step, run.phase) == (self.step, self.phase) and run.signal is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return run.module(*batch.data)


@pytest.mark.parametrize("phase", ["train", "val"])
@pytest.mark.parametrize("step", range(1, 9))
def test_a_signal_anywhere_costs_no_step_no_row_and_no_validation(tiny_run, tmp_path, step, phase):
    settings = {"length": 8, "log_every": 3, "validate_every": 4}
    validations = []

    @plugin
    class Listens:
        @hookimpl
        def on_validation_end(self, run):
            validations.append(run.progress.step)

    whole = tiny_run(Listens(), **settings, run_dir=tmp_path / "whole")
    expected, validations = list(validations), []
    kept: dict[int, dict] = {}
    at = step - 1 if phase == "train" else step
    sends = SendsAt(step=at, phase=phase)
    first = tiny_run(Keeps(kept=kept), sends, Listens(), **settings, run_dir=tmp_path / "first")
    if phase == "val" and step % 4:
        assert first.outcome == "finished"
        return
    assert (first.outcome, first.progress.step) == ("interrupted", step)
    second = tiny_run(
        Keeps(kept=kept, resume=step), Listens(), **settings, run_dir=tmp_path / "second"
    )
    assert second.outcome == "finished"
    assert_same_weights(whole, second)
    assert first.history + second.history == whole.history
    assert validations == expected


def test_a_second_signal_ends_at_once(tiny_run):
    ended = []

    @plugin
    class Insists:
        @hookimpl
        def on_step_start(self, run):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        @hookimpl
        def on_train_end(self, outcome):
            ended.append(outcome)

    run = tiny_run(Insists())
    assert (run.outcome, run.progress.step, ended) == ("interrupted", 0, ["interrupted"])


@pytest.mark.parametrize("first", [signal.SIGUSR1, signal.SIGTERM])
def test_a_batch_system_that_insists_does_not_cost_the_state(tiny_run, first):
    saved = []

    @plugin
    class Insists:
        """Receives a warning signal and then the request to end, as from batch systems."""

        @hookimpl
        def on_step_start(self):
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), signal.SIGTERM)

        @hookimpl
        def on_safe_point(self, run):
            saved.append(run.progress.step)

    run = tiny_run(Insists())
    assert (run.outcome, run.signal, saved) == ("interrupted", first, [1])


def test_a_signal_after_the_last_step_interrupts_no_plugin_at_its_end(tiny_run):
    ended = []

    @plugin
    class Requeues:
        @hookimpl
        def on_train_end(self, outcome):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
            ended.append(outcome)

    run = tiny_run(Requeues())
    assert (run.outcome, ended) == ("finished", ["finished"])


def test_the_window_of_a_step_is_never_that_of_another(tiny_run):
    seen = []

    @plugin
    class Looks:
        @hookimpl
        def on_step_start(self, run):
            seen.append((list(run.window), list(run.losses)))

    tiny_run(Looks())
    assert seen == [([], [])] * 4


def test_the_final_step_is_validated_and_logged_whatever_the_periods(tiny_run):
    run = tiny_run(length=7, log_every=3, validate_every=5)
    assert [row["step"] for row in run.history] == [3, 5, 6, 7]
    assert ["val/loss" in row for row in run.history] == [False, True, False, True]


@plugin
class Uneven:
    """One tensor of samples, cut into micro-batches of the given sizes; some targets padded."""

    sizes: list[int]
    dtype: str = "float64"

    @hookimpl
    def build_data(self):
        return self

    epoch_samples = None
    fingerprint = "uneven"

    def samples(self):
        torch_dtype = getattr(torch, self.dtype)
        generator = torch.Generator().manual_seed(3)
        count = sum(self.sizes)
        inputs = torch.randn(count, 5, 8, generator=generator, dtype=torch_dtype)
        targets = torch.randint(0, 7, (count, 5), generator=generator)
        padded = torch.rand(count, 5, generator=generator) < 0.4
        padded[:, 0] = False
        return inputs, targets.masked_fill(padded, -100)

    def batches(self, progress):
        inputs, targets = self.samples()
        while True:
            first = 0
            for size in self.sizes:
                part = slice(first, first + size)
                held = int((targets[part] != -100).sum())
                yield Batch((inputs[part], targets[part]), held, size, size * 5, first)
                first += size

    def validation(self):
        return {}


@plugin
class Classifier:
    """A linear classifier with torch's mean cross entropy as its loss, and plain SGD."""

    @hookimpl
    def build_model(self):
        return torch.nn.Linear(8, 7).double()

    @hookimpl
    def build_optimizer(self, run):
        return torch.optim.SGD(run.model.parameters(), lr=0.0)

    @hookimpl
    def forward(self, run, batch):
        inputs, targets = batch.data
        return torch.nn.functional.cross_entropy(
            run.module(inputs).flatten(0, 1), targets.flatten()
        )


@plugin
class Together:
    """Take all micro-batches of the data as one window."""

    count: int
    gradients: object = None

    @hookimpl
    def collect_batches(self, stream):
        return list(itertools.islice(stream, self.count))

    @hookimpl
    def on_step_end(self, run):
        self.gradients = [p.grad.clone() for p in run.parameters]


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_a_window_of_uneven_padded_micro_batches_has_the_gradients_of_one_batch(
    sizes, tmp_path_factory
):
    from fundamentallm import train

    found, losses = [], []
    for cut in (sizes, [sum(sizes)]):
        together = Together(count=len(cut))
        run = train(
            {"run": {"length": 1, "device": "cpu"}},
            plugins=[Uneven(sizes=cut), Classifier(), together],
            run_dir=tmp_path_factory.mktemp("run"),
        )
        found.append(torch.cat([g.flatten() for g in together.gradients]))
        losses.append(run.history[-1]["train/loss"])
    assert (found[0] - found[1]).norm() <= 1e-12 * found[1].norm()
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_micro_batch_without_targets_counts_for_nothing(tiny_run, tmp_path):
    class Padded(TinySamples):
        def batches(self, progress):
            for batch in super().batches(progress):
                yield batch
                data = (batch.data[0] * math.nan, batch.data[1])
                yield Batch(data, weight=0, samples=0, tokens=0)

    @plugin
    class PaddedData(TinyData):
        @hookimpl
        def build_data(self, run):
            return Padded(4, run.device)

    padded = tiny_run(PaddedData(), Together(count=2), run_dir=tmp_path / "a")
    assert_same_weights(padded, tiny_run(run_dir=tmp_path / "b"))


def test_losses_keep_their_weights_when_the_first_micro_batch_has_no_target(tiny_run):
    last = []

    class Padded(TinySamples):
        def batches(self, progress):
            for batch in super().batches(progress):
                yield Batch(batch.data, weight=0, samples=0, tokens=0)
                yield batch
                yield Batch(batch.data, weight=0, samples=0, tokens=0)

    @plugin
    class PaddedData(TinyData):
        @hookimpl
        def build_data(self, run):
            return Padded(4, run.device)

    @plugin
    class Watches:
        @hookimpl(wrapper=True)
        def train_microbatch(self, is_last):
            last.append(is_last)
            return (yield)

    run = tiny_run(PaddedData(), Together(count=3), Watches())
    assert math.isfinite(run.history[-1]["train/loss"])
    assert last == [True] * 4


def test_the_error_for_data_that_ends_names_the_end_of_the_data(tiny_run):
    class Short(TinySamples):
        def batches(self, progress):
            return itertools.islice(super().batches(progress), 2)

    @plugin
    class ShortData(TinyData):
        @hookimpl
        def build_data(self, run):
            return Short(4, run.device)

    with pytest.raises(PluginError, match="'short_data' .* ended after 2 micro-batches; `batches`"):
        tiny_run(ShortData())


def test_a_period_of_validation_without_held_out_data_is_an_error(tiny_run):
    with pytest.raises(SettingsError, match="no held-out split"):
        tiny_run(Uneven(sizes=[4], dtype="float64"), Classifier(), validate_every=2)


def test_a_rejected_step_leaves_no_trace_in_weights_or_metrics(tiny_run):
    @plugin
    class Poison:
        """Make the loss of step 2 NaN, and reject what is NaN."""

        @hookimpl
        def forward(self, run, batch):
            loss = run.module(*batch.data)
            run.log(f"{run.phase}/shadow", loss)
            return loss * math.nan if run.progress.step == 1 and run.phase == "train" else loss

        @hookimpl
        def judge_step(self, run):
            finite = torch.isfinite(run.losses[0])
            return None if finite else Rejection("nonfinite_loss", "NaN")

    run = tiny_run(Poison(), length=4, log_every=4)
    assert math.isfinite(run.history[-1]["train/loss"])
    assert (run.progress.step, run.progress.applied) == (4, 3)
    row = run.history[-1]
    assert row["train/shadow"] == row["train/loss"]


def test_a_rejected_step_keeps_what_was_logged_after_the_steps_before_it(tiny_run):
    @plugin
    class Picky:
        @hookimpl
        def judge_step(self, run):
            return Rejection("other", "even") if run.progress.step % 2 else None

        @hookimpl
        def on_step_end(self, run):
            run.log("perf/step", float(run.progress.step))

    run = tiny_run(Picky(), length=4, log_every=4)
    assert run.history[-1]["perf/step"] == 2.5


def test_a_loss_that_is_not_a_number_ends_the_run_before_it_can_be_saved(tiny_run):
    saved = []

    @plugin
    class Diverges:
        @hookimpl
        def forward(self, run, batch):
            return run.module(*batch.data) * (math.inf if run.progress.step >= 3 else 1.0)

        @hookimpl
        def on_safe_point(self, run):
            saved.append(run.progress.step)

    with pytest.raises(NotFiniteError, match="step 4: train/loss is (inf|nan)"):
        tiny_run(Diverges(), length=9, log_every=2)
    assert saved == [1, 2, 3]


def test_the_logged_loss_is_the_mean_since_the_last_row_weighed_by_targets(tiny_run):
    losses = []

    @plugin
    class Listens:
        @hookimpl
        def on_step_end(self, run):
            losses.append(float(run.losses[0]))

    run = tiny_run(Listens(), length=6, log_every=3)
    assert run.history[0]["train/loss"] == pytest.approx(sum(losses[:3]) / 3, rel=1e-12)
    assert run.history[1]["train/loss"] == pytest.approx(sum(losses[3:]) / 3, rel=1e-12)


def test_validation_leaves_weights_modes_and_random_state_as_they_were(tiny_run, tmp_path):
    @plugin
    class Careless:
        """Use the global random state in validation, and keep one layer in evaluation mode."""

        @hookimpl
        def forward(self, run, batch):
            if run.phase == "val":
                torch.rand(3)
                assert not any(m.training for m in run.module.modules())
            else:
                assert not run.model.dropout.training
                assert run.model.hidden.training
            return run.module(*batch.data)

        @hookimpl
        def on_step_start(self, run):
            run.model.dropout.eval()

    often = tiny_run(Careless(), length=8, validate_every=1, run_dir=tmp_path / "often")
    never = tiny_run(Careless(), length=8, run_dir=tmp_path / "never")
    assert_same_weights(often, never)


def test_dropout_matters_and_the_seed_decides_everything(tiny_run, tmp_path):
    one = tiny_run(seed=1, run_dir=tmp_path / "1")
    again = tiny_run(seed=1, run_dir=tmp_path / "2")
    other = tiny_run(seed=2, run_dir=tmp_path / "3")
    assert_same_weights(one, again)
    assert one.history == again.history
    assert not weights(one)["out.weight"].equal(weights(other)["out.weight"])


@plugin
class Keeps:
    """A saver in memory: keeps the snapshot of every step, and hands one out."""

    kept: dict[int, dict]
    resume: int = 0

    @hookimpl
    def read_checkpoint(self):
        return self.kept.get(self.resume)

    @hookimpl
    def on_safe_point(self, run):
        from copy import deepcopy

        if not self.resume:
            self.kept[run.progress.step] = deepcopy(run.snapshot())


@pytest.mark.parametrize("step", range(1, 8))
def test_a_run_restored_from_any_snapshot_ends_with_the_same_bits(tiny_run, tmp_path, step):
    kept: dict[int, dict] = {}
    whole = tiny_run(Keeps(kept=kept), length=8, log_every=3, run_dir=tmp_path / "whole")
    resumed = tiny_run(
        Keeps(kept=kept, resume=step), length=8, log_every=3, run_dir=tmp_path / "resumed"
    )
    assert_same_weights(whole, resumed)
    assert resumed.history == [row for row in whole.history if row["step"] > step]


def test_a_snapshot_is_distinguished_from_one_of_another_model(tiny_run, tmp_path):
    from fundamentallm import StorageError

    kept: dict[int, dict] = {}
    tiny_run(Keeps(kept=kept), run_dir=tmp_path / "a")
    kept[4]["model"]["more"] = torch.zeros(1)
    with pytest.raises(StorageError, match="one of another model"):
        tiny_run(Keeps(kept=kept, resume=4), run_dir=tmp_path / "b")


def test_a_snapshot_of_another_optimizer_is_refused(tiny_run, tmp_path):
    @plugin
    class Descent:
        @hookimpl
        def build_optimizer(self, run):
            return torch.optim.SGD(run.model.parameters(), lr=0.01)

    kept: dict[int, dict] = {}
    tiny_run(Keeps(kept=kept), run_dir=tmp_path / "a")
    with pytest.raises(SettingsError, match=r"optimizer is .*AdamW"):
        tiny_run(Keeps(kept=kept, resume=4), Descent(), run_dir=tmp_path / "b")


def test_an_optimizer_of_parameters_outside_the_model_is_refused(tiny_run):
    @plugin
    class Head:
        @hookimpl
        def build_optimizer(self, run):
            head = torch.nn.Linear(1, 1)
            return torch.optim.SGD([*run.model.parameters(), *head.parameters()], lr=0.01)

    with pytest.raises(SettingsError, match="not in run.model"):
        tiny_run(Head())


@plugin
class Counts:
    """Holds state of every kind."""

    from fundamentallm import state

    seen: int = state(0)
    rows: list = state(factory=list)
    tensor: object = state(None)

    @hookimpl
    def on_step_end(self, run):
        self.seen += 1
        self.rows.append([run.progress.step, 0.1 * self.seen])
        self.tensor = torch.full((2,), self.seen)


def test_the_state_of_plugins_is_saved_and_restored_by_their_names(tiny_run, tmp_path):
    kept: dict[int, dict] = {}
    whole = Counts()
    tiny_run(Keeps(kept=kept), whole, length=6, run_dir=tmp_path / "a")
    resumed = Counts()
    tiny_run(Keeps(kept=kept, resume=3), resumed, length=6, run_dir=tmp_path / "b")
    assert (resumed.seen, resumed.rows) == (whole.seen, whole.rows)
    assert resumed.tensor.equal(whole.tensor)


def test_plugins_may_come_and_go_when_a_run_is_resumed(tiny_run, tmp_path):
    kept: dict[int, dict] = {}
    whole = tiny_run(Keeps(kept=kept), Counts(), length=6, run_dir=tmp_path / "a")
    without = tiny_run(Keeps(kept=kept, resume=3), length=6, run_dir=tmp_path / "b")
    assert_same_weights(whole, without)


def test_the_optimizer_state_is_kept_by_parameter_name(tiny_run):
    run = tiny_run()
    kept = run.snapshot()["optimizer"]
    assert set(kept) == {name for name, _ in run.model.named_parameters()}
    assert set(kept["out.weight"]) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_run_that_is_done_already_trains_no_further(tiny_run, tmp_path):
    kept: dict[int, dict] = {}
    tiny_run(Keeps(kept=kept), length=4, run_dir=tmp_path / "a")
    recorder = Recorder()
    run = tiny_run(Keeps(kept=kept, resume=4), length=4, run_dir=tmp_path / "b", trace=recorder)
    assert run.outcome == "finished"
    assert "on_step_start" not in recorder.names
    assert recorder.names[-2:] == ["on_train_start", "on_train_end"]


def test_the_length_may_be_in_epochs_or_tokens(tiny_run, tmp_path):
    assert tiny_run(length="2 epochs", run_dir=tmp_path / "a").progress.samples == 32
    run = tiny_run(length="10 tokens", run_dir=tmp_path / "b")
    assert (run.progress.tokens, run.progress.step) == (12, 3)
    assert run.progress.epoch == 12 / 16


def test_a_run_keeps_the_last_5000_rows_in_memory(tiny_run):
    @plugin
    class Fills:
        @hookimpl
        def on_train_start(self, run):
            run.history += [{"step": -1}] * 6000

    run = tiny_run(Fills(), length=2, log_every=1)
    assert len(run.history) == 5000
    assert [row["step"] for row in run.history[-3:]] == [-1, 1, 2]


def test_time_is_counted_as_training_time(tiny_run):
    @plugin
    class SlowData(TinyData):
        @hookimpl
        def build_data(self, run):
            time.sleep(0.2)
            return super().build_data(run)

    run = tiny_run(SlowData(), length="0.05 seconds")
    assert run.progress.seconds < 0.2
    assert run.progress.seconds >= 0.05
    assert Period(0.05, "seconds").reached(run.progress)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA: no room"), OutOfMemoryError),
        (MemoryError(), OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), OutOfMemoryError),
        (RuntimeError("DefaultCPUAllocator: not enough memory: 8 bytes"), OutOfMemoryError),
        (RuntimeError("MPS backend out of memory"), OutOfMemoryError),
        (RuntimeError("the memory of a past run"), PluginError),
    ],
    ids=str,
)
def test_a_run_that_no_memory_is_left_for_ends_with_an_error_of_its_own(tiny_run, error, kind):
    @plugin
    class Hoards:
        """Has no room for the optimizer's state."""

        @hookimpl
        def optimizer_step(self):
            raise error

    with pytest.raises(kind):
        tiny_run(Hoards())
    assert ran_out_of_memory(error) == (kind is OutOfMemoryError)
