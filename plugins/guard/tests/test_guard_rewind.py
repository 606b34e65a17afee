"""A loss spike rewinds the run to a sound checkpoint; it continues after the data of the spike."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm import Batch, NotFiniteError, Progress, Run, field, hookimpl, plugin
from fundamentallm.testing import TinyData, TinyRun, TinySamples, assert_same_weights
from fundamentallm_guard import Guard
from fundamentallm_guard.spikes import FLAT, limit, onset

SPIKE: dict[str, Any] = {"spike_window": 5, "spike_threshold": 200.0}


@plugin
class Spiky(TinyData):
    """The tiny samples; the targets of the batches ``at`` are multiplied by ``by``, those of
    ``slightly`` by 55, and ``lacking`` ones left out."""

    at: list[int] = field(factory=list)
    slightly: list[int] = field(factory=list)
    lacking: list[int] = field(factory=list)
    by: float = 1000.0

    @hookimpl
    def build_data(self, run: Run) -> Any:
        return SpikySamples(self, run.device)


class SpikySamples(TinySamples):
    def __init__(self, owner: Spiky, device: str) -> None:
        super().__init__(owner.batch_size, device)
        self.owner = owner

    def batches(self, progress: Progress) -> Iterator[Batch]:
        for batch in super().batches(progress):
            if batch.first // 4 + 1 not in self.owner.lacking:
                yield batch

    def batch(self, indices: range) -> Batch:
        batch, number = super().batch(indices), indices[0] // 4 + 1
        if number in self.owner.at:
            batch.data[1][:] *= self.owner.by
        if number in self.owner.slightly:
            batch.data[1][:] *= 55
        return batch


def rewinding(**more: Any) -> Guard:
    return Guard(spike="rewind", **{**SPIKE, **more})


def saving(every: int = 5, **more: Any) -> dict[str, Any]:
    table = {"every": every, "keep_last": 20, "save_final": False}
    return {"checkpoint": {**table, "allow_changes": ["spiky.class"], **more}}


def test_a_rewound_run_ends_as_if_all_data_since_the_checkpoint_had_been_left_out(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Spiky(at=[13])
    run = tiny_run("checkpoint", rewinding(), data, settings=saving(), length=20, log_every=1)
    lacking = tiny_run(
        Spiky(lacking=[11, 12, 13]), length=20, log_every=1, run_dir=tmp_path / "lacking"
    )
    assert_same_weights(run, lacking)
    assert (run.progress.step, run.progress.applied, run.progress.samples) == (20, 20, 92)
    assert [row["step"] for row in run.history] == list(range(1, 21))
    losses = [row["train/loss"] for row in run.history]
    assert losses == [row["train/loss"] for row in lacking.history]
    assert max(losses) < 100
    assert [row.get("guard/rewinds") for row in run.history][9:12] == [None, 1, None]
    (said,) = [r.getMessage() for r in caplog.records if "goes back" in r.getMessage()]
    assert said.startswith("step 13: the loss ")
    assert "(4 samples from index 48 in the order of the data); the run goes back to" in said
    assert "goes back to step-00000010 and continues with the data after these" in said


def test_a_run_can_rewind_because_of_nan(tiny_run: TinyRun, tmp_path: Path) -> None:
    guard, data = Guard(nonfinite="rewind"), Spiky(at=[13], by=math.nan)
    run = tiny_run("checkpoint", guard, data, settings=saving(), length=20)
    lacking = tiny_run(Spiky(lacking=[11, 12, 13]), length=20, run_dir=tmp_path / "lacking")
    assert_same_weights(run, lacking)
    assert math.isfinite(run.history[-1]["train/loss"])


def test_a_spike_can_be_skipped(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tiny_run(Guard(spike="skip", **SPIKE), Spiky(at=[9, 13]), length=20)
    lacking = tiny_run(Spiky(lacking=[9, 13]), length=18, run_dir=tmp_path / "lacking")
    assert_same_weights(run, lacking)


def test_a_spike_whose_gradients_overflow_in_fp16_is_a_spike(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    table = {"amp": {"dtype": "fp16", "init_scale": 65536.0, "growth_interval": 4}}
    guard, data = Guard(spike="skip", **SPIKE), Spiky(at=[9, 13], by=1e5)
    run = tiny_run("amp", guard, data, settings=table, length=20)
    lacking = Spiky(lacking=[9, 13], by=1e5)
    other = tiny_run("amp", lacking, settings=table, length=18, run_dir=tmp_path / "lacking")
    assert guard.skipped == 2
    assert_same_weights(run, other)
    assert run.snapshot()["plugins"]["amp"] == other.snapshot()["plugins"]["amp"]
    without = tiny_run("amp", data, settings=table, length=20, run_dir=tmp_path / "without")
    assert without.snapshot()["plugins"]["amp"]["overflows"] > 0


def test_a_spike_can_end_the_run(tiny_run: TinyRun) -> None:
    with pytest.raises(NotFiniteError, match=r"^step 9: the loss .* is a spike: .*index 32 in"):
        tiny_run(Guard(spike="stop", **SPIKE), Spiky(at=[9]), length=20)


def test_no_loss_is_a_spike_until_the_window_is_full(tiny_run: TinyRun) -> None:
    assert tiny_run(Guard(spike="stop", **SPIKE), Spiky(at=[5]), length=5).progress.applied == 5


def test_the_updates_that_led_to_a_spike_are_undone(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    # The loss of step 10 is raised, but no spike yet: what shows at 11 began with the update of 9.
    guard = rewinding(spike_window=8, spike_threshold=10_000.0)
    data = Spiky(at=[11], slightly=[10])
    tiny_run("checkpoint", guard, data, settings=saving(every=1), length=13)
    assert "step 11: the loss" in caplog.text
    assert "goes back to step-00000008 " in caplog.text


def test_a_sudden_spike_undoes_one_update_only(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_run("checkpoint", rewinding(), Spiky(at=[12]), settings=saving(every=1), length=13)
    assert "goes back to step-00000010 " in caplog.text


def test_more_than_max_rewinds_end_the_run(tiny_run: TinyRun) -> None:
    guard, data = rewinding(max_rewinds=2), Spiky(at=[13, 17, 21, 25])
    with pytest.raises(NotFiniteError, match=r"^step \d+: .*rewound 2 times already, as often as "):
        tiny_run("checkpoint", guard, data, settings=saving(), length=30)
    assert guard.rewinds == 2


def test_without_a_checkpoint_steps_are_skipped_with_one_warning(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guard, data = rewinding(), Spiky(at=[9, 13])
    run = tiny_run(guard, data, length=20)
    lacking = tiny_run(Spiky(lacking=[9, 13]), length=18, run_dir=tmp_path / "lacking")
    assert_same_weights(run, lacking)
    assert caplog.text.count("there is no sound checkpoint from before step") == 1


def test_a_loss_that_stays_high_ends_the_run(tiny_run: TinyRun) -> None:
    guard, data = Guard(spike="skip", max_skips=3, **SPIKE), Spiky(at=list(range(9, 30)))
    with pytest.raises(NotFiniteError, match=r"^step 12: .*the 3 steps before it were skipped"):
        tiny_run(guard, data, length=20)


@pytest.mark.parametrize("place", ["elsewhere", "second"])
def test_checkpoints_are_found_where_they_are(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    table = saving(1, folder=str(tmp_path / "elsewhere"))
    names = ["checkpoint"]
    if place == "second":
        archive = {"plugin": "checkpoint", "every": 2, "keep_last": 20, "save_final": False}
        table, names = {**saving(50), "archive": archive}, ["checkpoint", "archive"]
    # The newest is one that comes too late, so that an older one is asked for by its name.
    tiny_run(*names, rewinding(), Spiky(at=[13]), settings=table, length=14)
    assert f"goes back to step-000000{'10' if place == 'second' else '11'} " in caplog.text


def test_spikes_are_found_after_losses_that_are_nan(tiny_run: TinyRun) -> None:
    @plugin
    class Odd:
        """Reports a loss that is not finite when the gradients are complete."""

        @hookimpl
        def finish_gradients(self, run: Run) -> None:
            if run.progress.step in (3, 4):
                run.losses[0] = run.losses[0] * math.nan

    guard = Guard(nonfinite="off", spike="stop", **SPIKE)
    with pytest.raises(NotFiniteError, match="step 9: the loss .* is a spike"):
        tiny_run(guard, Odd(), Spiky(at=[9]), length=10, log_every=100)
    assert all(map(math.isfinite, guard.losses))


@plugin
class Damages:
    """Damages a checkpoint once it is there."""

    step: int
    how: str

    @hookimpl
    def on_checkpoint_saved(self, folder: Path) -> None:
        if not folder.name.endswith(str(self.step)):
            return
        path, aside = folder / "model.safetensors", folder.parent / "elsewhere"
        if self.how == "gone" and not aside.exists():
            folder.rename(aside)
        elif self.how == "damaged":
            data = bytearray(path.read_bytes())
            data[-3] ^= 1
            path.write_bytes(data)


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_checkpoint_that_is_gone_or_damaged_is_passed_over(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    damages = Damages(step=10, how=how)
    run = tiny_run("checkpoint", rewinding(), damages, Spiky(at=[13]), settings=saving(), length=15)
    assert "goes back to step-00000005 " in caplog.text
    assert run.progress.applied == 15


@plugin
class BreaksAWeight:
    """Makes a weight infinite while step 10 is saved."""

    @hookimpl
    def on_log(self, run: Run) -> None:
        if run.progress.step == 10:
            run.model.out.bias.data[0] = math.inf

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        if run.progress.step == 10:
            run.model.out.bias.data[0] = 0.0


# In the second case the newest checkpoint is too young, and the next one is asked for by its name.
@pytest.mark.parametrize("spike", [13, 16])
def test_a_checkpoint_with_an_infinity_in_it_is_passed_over(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture, spike: int
) -> None:
    parts = ["checkpoint", rewinding(), BreaksAWeight(), Spiky(at=[spike])]
    tiny_run(*parts, settings=saving(), length=16, log_every=1)
    assert "goes back to step-00000005 " in caplog.text
    assert ("step 10 contains NaN or infinity: trying" in caplog.text) == (spike == 16)


@plugin
class Stops:
    """Stops the run after a step."""

    last: int

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if run.progress.step == self.last:
            run.stop("enough for now")


@pytest.mark.parametrize("after", [3, 8, 12])
def test_the_losses_that_make_a_spike_survive_a_resume(
    tiny_run: TinyRun, tmp_path: Path, after: int
) -> None:
    table = saving(save_final=True)
    whole = tiny_run("checkpoint", rewinding(), Spiky(at=[13]), settings=table, length=20)
    where = tmp_path / "parts"
    tiny_run(
        "checkpoint",
        rewinding(),
        Spiky(at=[13]),
        Stops(last=after),
        settings=table,
        length=20,
        run_dir=where,
    )
    rest = tiny_run(
        "checkpoint", rewinding(), Spiky(at=[13]), settings=table, length=20, run_dir=where
    )
    assert_same_weights(whole, rest)
    assert rest.progress.samples == whole.progress.samples == 92


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from fundamentallm import hookimpl, plugin, train
from fundamentallm.testing import compose_tiny
from test_guard_rewind import Spiky, rewinding, saving

@plugin
class Dies:
    @hookimpl
    def {hook}(self, run):
        if {when}:
            os.kill(os.getpid(), signal.SIGKILL)

composed = compose_tiny("checkpoint", "jsonl", rewinding(), Spiky(at=[13]), Dies(),
                        settings=saving(3), length=20, log_every=1)
train(composed, run_dir=Path({folder!r}))
"""


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in found]


# Right after the way back, and when there is a checkpoint of the new way.
@pytest.mark.parametrize(
    ("hook", "when"),
    [
        ("on_rewind", "True"),
        pytest.param(
            "on_step_start",
            "run.progress.step == 13 and run.progress.samples > 52",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_killed_after_a_rewind_and_resumed_ends_with_the_same_bits(
    tiny_run: TinyRun, tmp_path: Path, hook: str, when: str
) -> None:
    where = tmp_path / "killed"
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(where), hook=hook, when=when)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = forked.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()

    parts = ("checkpoint", "jsonl", rewinding, lambda: Spiky(at=[13]))
    made = [[part() if callable(part) else part for part in parts] for _ in range(2)]
    words: dict[str, Any] = {"settings": saving(3), "length": 20, "log_every": 1}
    resumed = tiny_run(*made[0], run_dir=where, **words)
    whole = tiny_run(*made[1], run_dir=tmp_path / "whole", **words)
    assert_same_weights(whole, resumed)
    assert whole.progress.samples == resumed.progress.samples == 4 * (20 + 4)
    assert rows(where) == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(where)] == list(range(1, 21))


@pytest.mark.parametrize("first", [True, False])
def test_a_rewind_is_the_same_wherever_the_guard_is_listed(
    tiny_run: TinyRun, tmp_path: Path, first: bool
) -> None:
    names = ["guard", "checkpoint", "jsonl", "adamw", "grad_clip", "lr_schedule", "accumulate"]
    settings: dict[str, Any] = {
        **saving(),
        "guard": {"spike": "rewind", "spike_window": 5, "spike_threshold": 200.0},
        "grad_clip": {"max_norm": 1.0},
        "accumulate": {"microbatches": 2},
    }
    runs = [
        tiny_run(*listed, Spiky(at=[26]), settings=settings, length=20, run_dir=tmp_path / place)
        for place, listed in {
            "one": names,
            "other": names[::-1] if first else names[3:] + names[:3],
        }.items()
    ]
    assert_same_weights(*runs)
    assert runs[0].history == runs[1].history
    assert runs[0].progress.microbatches == 2 * (20 + 3)


finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=40), st.floats(0.1, 100))
def test_the_limit_is_the_median_plus_threshold_times_mad(
    losses: list[float], threshold: float
) -> None:
    center = statistics.median(losses)
    mad = statistics.median(abs(loss - center) for loss in losses)
    assert limit(losses, threshold) == center + threshold * max(mad, FLAT * abs(center))


@given(st.lists(st.floats(1, 2), min_size=5, max_size=40), st.data())
def test_less_than_half_of_the_losses_cannot_move_the_limit_beyond_the_others(
    losses: list[float], data: st.DataObject
) -> None:
    count = data.draw(st.integers(0, (len(losses) - 1) // 2))
    spoiled = [1e12] * count + losses[count:]
    assert limit(spoiled, 10.0) <= 2 + 10 * 1


@given(
    quiet=st.lists(st.floats(1.0, 1.004), min_size=12, max_size=30),  # flat, for any of them
    raised=st.lists(st.floats(50, 60), max_size=5),
)
def test_a_spike_begins_with_the_first_of_the_raised_losses_before_it(
    quiet: list[float], raised: list[float]
) -> None:
    losses = [*quiet, *raised]
    steps = [7 + 2 * i for i in range(len(losses))]
    step = steps[-1] + 2
    began = onset(steps, losses, 10.0, step)
    assert began == (steps[len(quiet)] if raised else step)


def test_a_spike_at_the_first_loss_begins_there() -> None:
    assert onset([], [], 10.0, 7) == 7
