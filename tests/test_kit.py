"""The kit for authors of plugins finds what it promises to find."""

from __future__ import annotations

import inspect
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest

from fundamentallm import PluginError, Run, SettingsError, field, hookimpl, plugin, state
from fundamentallm.testing import LoggerContract, Memory, PluginContract, assert_same_weights


@plugin
class Forgetful:
    """Lowers the learning rate with every step, and forgets how far it was."""

    seen: int = field(init=False, default=0)

    @hookimpl
    def on_step_end(self) -> None:
        self.seen += 1

    @hookimpl
    def lr_factor(self) -> float:
        return 1 / (1 + self.seen)


@plugin
class Mindful(Forgetful):
    """Does the same, and says what its state is."""

    seen: int = state(0)


def contract(of: type) -> PluginContract:
    return type("Contract", (PluginContract,), {"plugin": of})()


def test_state_that_no_checkpoint_holds_breaks_the_contract(tiny_run):
    contract(Mindful).test_a_resumed_run_ends_with_the_same_bits(tiny_run)
    with pytest.raises(AssertionError, match="these weights differ"):
        contract(Forgetful).test_a_resumed_run_ends_with_the_same_bits(tiny_run)


@plugin
class Meddles:
    """Says that it changes no weights, and changes them."""

    role = "observer"

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        for parameter in run.parameters:
            parameter.data.mul_(0.5)


def test_an_observer_that_changes_weights_breaks_the_contract(tiny_run, tmp_path):
    with pytest.raises(AssertionError, match="these weights differ"):
        contract(Meddles).test_a_role_outside_the_training_changes_no_weights(tiny_run, tmp_path)


@pytest.fixture
def kind() -> str:
    """Return the plugin that joins the processes."""
    return "ddp"


@plugin
class Differs:
    """Does in one process what it does not do in the other."""

    what: str = "state"
    steps: int = state(0)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        if self.what == "refuses" and run.world_size > 1:
            raise SettingsError("differs: works in one process only")

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        self.steps += run.rank if self.what == "state" else 1
        if self.what == "weights" and run.rank:
            for parameter in run.parameters:
                parameter.data.mul_(0.5)
        if self.what == "message" and run.rank:
            run.hook.agree(run=run, topic="mine", mine=1)


@pytest.mark.parametrize("what", ["state", "weights", "message"])
def test_processes_that_end_differently_break_the_contract(two_processes, kind, what):
    broken = type("Broken", (PluginContract,), {"plugin": Differs, "needs": {"what": what}})()
    with pytest.raises(AssertionError):
        broken.test_two_processes_end_alike(two_processes, kind)


def test_a_plugin_that_refuses_several_processes_keeps_the_contract(two_processes, kind):
    keeps = type("Keeps", (PluginContract,), {"plugin": Differs, "needs": {"what": "refuses"}})()
    keeps.test_two_processes_end_alike(two_processes, kind)


def test_memory_goes_back_once(tiny_run, tmp_path):
    run = tiny_run(Memory(step=2, later=4), length=6)
    assert (run.progress.step, run.progress.samples) == (6, 32)
    assert_same_weights(run, tiny_run(Memory(step=2, later=4), length=6, run_dir=tmp_path / "two"))


@plugin
class Lines:
    """Writes each row as a line of ``lines.txt``."""

    role = "observer"

    _path: Path | None = field(init=False, default=None)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        if self.writes(run):
            self._path = run.folder / "lines.txt"
            if self._path.is_file() and run.progress.step == 0:
                self.set_aside(self._path)
            self.drop(run)

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        if self._path is not None:
            self.drop(run)

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": run.progress.step, **metrics}) + "\n")

    def writes(self, run: Run) -> bool:
        return run.rank == 0

    def set_aside(self, path: Path) -> None:
        number = len(list(path.parent.glob("lines.*.old")))
        aside = path.rename(path.with_name(f"lines.{number}.old"))
        logging.getLogger("fundamentallm").warning("the earlier rows are in %s", aside.name)

    def drop(self, run: Run) -> None:
        found = read_lines(self._path) if self._path.is_file() else []
        stay = [row for row in found if row["step"] <= run.progress.logged_step]
        self._path.write_text("".join(json.dumps(row) + "\n" for row in stay))


def read_lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class TestLines(LoggerContract):
    # Starting a process takes longer than all the other tests; the loggers of this project do it.
    test_a_killed_process_loses_no_row = None

    plugin = Lines
    target = "lines.txt"
    aside = "lines.*.old"

    def rows(self, folder: Path) -> list[dict[str, float]]:
        return read_lines(folder / self.target)


class Repeats(Lines):
    def drop(self, run: Run) -> None:
        self._path.touch()


class Empties(Lines):
    def drop(self, run: Run) -> None:
        self._path.write_text("")


class WritesInEveryProcess(Lines):
    def writes(self, run: Run) -> bool:
        return True


class Overwrites(Lines):
    def set_aside(self, path: Path) -> None:
        path.unlink()


class EndsTheRun(Lines):
    role = "control"


class Changes(Lines):
    """Calls ``change`` before it writes a row."""

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        super().on_log(run, self.change(metrics))

    def change(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics


class Rounds(Changes):
    def change(self, metrics: dict[str, float]) -> dict[str, float]:
        return {name: float(f"{value:.6g}") for name, value in metrics.items()}


class LeavesOutNan(Changes):
    def change(self, metrics: dict[str, float]) -> dict[str, float]:
        return {name: value for name, value in metrics.items() if value == value}


class DrawsARandomNumber(Changes):
    def change(self, metrics: dict[str, float]) -> dict[str, float]:
        return metrics if random.random() else {}


class LeavesFilesOpen(Changes):
    opened: list[Any] = []

    def change(self, metrics: dict[str, float]) -> dict[str, float]:
        self.opened.append(self._path.open("a"))
        return metrics


class Buffers(Lines):
    """Writes the rows at the end of the run."""

    waiting: dict[int, dict[str, float]] = {}

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        self.waiting[run.progress.step] = metrics

    @hookimpl
    def on_train_end(self) -> None:
        rows = [{"step": step, **row} for step, row in self.waiting.items()]
        self._path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (Repeats, "test_a_resumed_run_has_every_row_once"),
        (Repeats, "test_a_run_that_is_resumed_twice_has_every_row_once"),
        (Repeats, "test_a_row_that_the_run_logs_again_on_resuming_is_there_once"),
        (Repeats, "test_a_rewind_drops_the_rows_of_the_void_steps"),
        (Empties, "test_a_resumed_run_has_every_row_once"),
        (Empties, "test_a_resumed_run_appends_to_a_file_without_later_rows"),
        (WritesInEveryProcess, "test_only_the_first_process_writes"),
        (WritesInEveryProcess, "test_two_processes_end_alike"),
        (Overwrites, "test_a_run_from_step_0_in_the_same_folder_keeps_the_earlier_rows"),
        (EndsTheRun, "test_it_has_the_role_of_an_observer"),
        (
            EndsTheRun,
            "test_a_target_that_cannot_be_written_mutes_the_logger_and_the_run_goes_on",
        ),
        (Rounds, "test_the_rows_are_what_the_run_logged"),
        (LeavesOutNan, "test_values_are_exact_and_may_be_nan_or_infinite"),
        (DrawsARandomNumber, "test_it_changes_nothing_in_the_run_and_draws_no_random_number"),
        (LeavesFilesOpen, "test_no_file_stays_open"),
        (Buffers, "test_a_row_can_be_read_as_soon_as_it_is_logged"),
    ],
)
def test_a_logger_with_a_mistake_breaks_the_contract(broken, test, request):
    method = getattr(type("Contract", (TestLines,), {"plugin": plugin(broken)})(), test)
    names = [name for name in inspect.signature(method).parameters if name != "self"]
    # An exception that ends the run is as good as a failed comparison.
    with pytest.raises((AssertionError, PluginError)):
        method(**{name: request.getfixturevalue(name) for name in names})
