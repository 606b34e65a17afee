"""A plugin object that is part of a second run starts there without the state of the first."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from fundamentallm import Run, field, hookimpl, plugin, state


@plugin
class Counts:
    """Has state of each kind, and notes what it is at the start of every run."""

    starts: list[Any] = field(factory=list)
    """A setting: a list that belongs to the user."""
    steps: int = state(0)
    seen: list[int] = state(factory=list)
    scratch: int = field(init=False, default=0)
    derived: list[int] = field(init=False, factory=list)

    def __attrs_post_init__(self) -> None:
        self.derived = [7]

    @hookimpl
    def on_train_start(self) -> None:
        self.starts.append((self.steps, list(self.seen), self.scratch, list(self.derived)))

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        self.steps += 1
        self.scratch += 1
        self.seen.append(run.progress.step)
        self.derived.append(8)


@plugin
class Owns:
    """Keeps its state by methods of its own, in a field that is not declared as state."""

    total: int = field(init=False, default=0)
    starts: list[int] = field(factory=list)

    @hookimpl
    def on_train_start(self) -> None:
        self.starts.append(self.total)

    @hookimpl
    def on_step_end(self) -> None:
        self.total += 1

    def get_state(self) -> dict[str, Any]:
        return {"total": self.total}

    def set_state(self, state: dict[str, Any]) -> None:
        self.total = state["total"]


@plugin
class Resumes:
    """Keeps the last snapshot, and hands it out if it is asked to."""

    kept: list[Any] = field(factory=list)
    resume: bool = False

    @hookimpl
    def read_checkpoint(self) -> Any:
        return deepcopy(self.kept[-1]) if self.resume else None

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if not self.resume:
            self.kept.append(deepcopy(run.snapshot()))


def test_a_plugin_object_starts_every_run_with_the_state_it_was_made_with(tiny_run, tmp_path):
    counts, owns = Counts(), Owns()
    for name in ("a", "b", "c"):
        tiny_run(counts, owns, length=3, run_dir=tmp_path / name)
    assert counts.starts == [(0, [], 0, [7])] * 3
    assert owns.starts == [0, 0, 0]


def test_a_run_that_restores_a_checkpoint_gives_its_state_to_a_used_object(tiny_run, tmp_path):
    counts, owns, saves = Counts(), Owns(), Resumes()
    tiny_run(counts, owns, saves, length=3, run_dir=tmp_path / "a")
    tiny_run(counts, owns, saves, length=2, run_dir=tmp_path / "b")
    saves.kept.pop()
    saves.resume = True
    tiny_run(counts, owns, saves, length=3, run_dir=tmp_path / "c")
    assert counts.starts[-1][:2] == (1, [1])
    assert owns.starts == [0, 0, 1]


def test_early_stopping_used_twice_does_not_stop_an_untrained_model(tiny_run, tmp_path):
    from fundamentallm import find_plugins

    early_stopping = find_plugins()["early_stopping"][0].load()
    stopper = early_stopping(patience=1, min_delta=10.0)
    steps = [
        tiny_run(stopper, length=9, validate_every=1, run_dir=tmp_path / name).progress.step
        for name in ("a", "b")
    ]
    assert steps == [2, 2]


def test_attributes_set_on_an_object_before_its_first_run_are_kept(tiny_run):
    counts = Counts()
    counts.steps = 5
    tiny_run(counts, length=1)
    assert counts.starts == [(5, [], 0, [7])]


@plugin
class Doubles:
    """Changes a setting when it is made."""

    rate: float = 1.0

    def __attrs_post_init__(self) -> None:
        self.rate *= 2

    @hookimpl
    def on_train_start(self) -> None:
        pass


def test_a_setting_that_the_class_derives_is_not_derived_twice(tiny_run):
    doubles = Doubles()
    for _ in range(2):
        tiny_run(doubles, length=1)
        assert doubles.rate == 2.0
