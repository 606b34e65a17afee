"""Epochs begin and end once each, at the same steps in a run that was resumed or rewound."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from fundamentallm import Run, field, hookimpl, plugin, state
from fundamentallm.testing import TinyData


@plugin
class Epochs:
    """Notes the events of epochs, with the step at which they come, as state."""

    events: list[list[Any]] = state(factory=list)
    validations: int = state(0)

    @hookimpl
    def on_epoch_start(self, run: Run, epoch: int) -> None:
        self.events.append(["start", epoch, run.progress.step])

    @hookimpl
    def on_epoch_end(self, run: Run, epoch: int) -> None:
        self.events.append(["end", epoch, run.progress.step])
        run.log("epochs/ended", epoch)

    @hookimpl
    def on_validation_end(self) -> None:
        self.validations += 1


@plugin
class Saves:
    """Keeps the snapshot of every step in memory, and hands one out."""

    kept: dict[int, Any] = field(factory=dict)
    resume: int = 0
    rewind_at: int = 0
    rewound: bool = field(init=False, default=False)

    @hookimpl
    def read_checkpoint(self, run: Run) -> Any:
        if run.wanted_checkpoint:
            return deepcopy(self.kept[int(run.wanted_checkpoint[5:])])
        return deepcopy(self.kept.get(self.resume))

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if run.progress.step == self.rewind_at and not self.rewound:
            self.rewound = True
            run.rewind("step-2")

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if not self.resume:
            self.kept[run.progress.step] = deepcopy(run.snapshot())


# Sixteen samples make an epoch.
AFTER_TEN_STEPS = {
    4: [["start", 0, 0], ["end", 0, 4], ["start", 1, 4], ["end", 1, 8], ["start", 2, 8]],
    6: [
        ["start", 0, 0],
        ["end", 0, 3],
        ["start", 1, 3],
        ["end", 1, 6],
        ["start", 2, 6],
        ["end", 2, 8],
        ["start", 3, 8],
    ],
}


@pytest.mark.parametrize("size", AFTER_TEN_STEPS)
def test_a_step_that_takes_an_epochs_last_sample_ends_it_and_the_next_step_starts_another(
    tiny_run, size
):
    epochs = Epochs()
    tiny_run(TinyData(batch_size=size), epochs, length=10)
    assert epochs.events == AFTER_TEN_STEPS[size]


def test_a_window_larger_than_an_epoch_starts_and_ends_the_epochs_within_it(tiny_run):
    epochs = Epochs()
    tiny_run(TinyData(batch_size=40), epochs, length=1)
    assert epochs.events == [["start", 0, 0], ["end", 0, 1], ["start", 1, 1], ["end", 1, 1]]


@pytest.mark.parametrize("size", AFTER_TEN_STEPS)
@pytest.mark.parametrize("step", range(1, 10))
def test_a_run_resumed_from_any_step_has_each_epoch_once(tiny_run, tmp_path, size, step):
    kept: dict[int, Any] = {}
    data = TinyData(batch_size=size)
    tiny_run(data, Epochs(), Saves(kept=kept), length=10, run_dir=tmp_path / "a")
    epochs = Epochs()
    tiny_run(data, epochs, Saves(kept=kept, resume=step), length=10, run_dir=tmp_path / "b")
    assert epochs.events == AFTER_TEN_STEPS[size]


@pytest.mark.parametrize("at", range(3, 8))
def test_a_rewound_run_ends_the_epochs_whose_data_it_leaves_behind(tiny_run, at):
    epochs = Epochs()
    run = tiny_run(epochs, Saves(rewind_at=at), length=8)
    assert run.progress.samples == 4 * (8 + at - 2)
    names = [(kind, epoch) for kind, epoch, _ in epochs.events]
    ended = run.progress.samples // 16
    expected = [(kind, epoch) for epoch in range(ended) for kind in ("start", "end")]
    assert names[: len(expected)] == expected
    assert names[len(expected) :] in ([], [("start", ended)])


def test_the_end_of_an_epoch_comes_before_the_row_and_the_safe_point_of_its_step(tiny_run):
    saves = Saves()
    run = tiny_run(Epochs(), saves, length=5, log_every=4, validate_every=4)
    assert run.history[0]["epochs/ended"] == 0.0
    assert saves.kept[4]["plugins"]["epochs"]["events"][-1] == ["end", 0, 4]
    assert saves.kept[3]["plugins"]["epochs"]["events"] == [["start", 0, 0]]


def test_a_stop_asked_for_at_the_end_of_an_epoch_ends_that_step_validated(tiny_run):
    @plugin
    class Enough:
        @hookimpl
        def on_epoch_end(self, run):
            run.stop("one epoch is enough")

    run = tiny_run(Enough(), length=9)
    assert run.progress.step == 4
    assert "val/loss" in run.history[-1]


def test_data_without_epochs_has_no_epoch_events(tiny_run):
    class Endless:
        epoch_samples, fingerprint = None, "endless"

        def __init__(self, run):
            self.within = TinyData().build_data(run)

        def batches(self, progress):
            return self.within.batches(progress)

        def validation(self):
            return {}

    @plugin
    class EndlessData:
        @hookimpl
        def build_data(self, run):
            return Endless(run)

    epochs = Epochs()
    tiny_run(EndlessData(), epochs, length=5)
    assert epochs.events == []
