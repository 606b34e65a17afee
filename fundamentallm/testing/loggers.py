"""The contract that every logger fulfils, as a class of tests to subclass."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from fundamentallm import hookimpl, plugin
from fundamentallm.testing.contracts import PluginContract
from fundamentallm.testing.processes import TwoProcesses
from fundamentallm.testing.recorder import Memory, assert_same_weights
from fundamentallm.testing.tiny import TinyRun, compose_tiny

if TYPE_CHECKING:
    from fundamentallm import Run

Row = dict[str, float]
"""The step and the metrics of a row, as in ``run.history``."""

KILLED = """
import os
from pathlib import Path
from {module} import {name}
from fundamentallm import hookimpl, plugin, train
from fundamentallm.host import structure
from fundamentallm.testing import compose_tiny

@plugin
class KillsItself:
    @hookimpl
    def on_safe_point(self, run):
        if run.progress.step == 3:
            os.kill(os.getpid(), 9)

logger = structure({needs!r}, {name})
train(compose_tiny(logger, KillsItself(), length=9, log_every=1), run_dir=Path({folder!r}))
"""


class LoggerContract(PluginContract):
    """What every logger promises: each row once and exact, whatever happens to the process.

    Subclass it in the logger's suite, in place of ``PluginContract``. Name the class and what it
    writes, and read the rows back::

        class TestContract(LoggerContract):
            plugin = Csv
            target = "metrics.csv"

            def rows(self, folder): ...
    """

    target: ClassVar[str]
    """Name of the file or folder in the run folder that the logger writes."""
    at_once: ClassVar[bool] = True
    """Whether a row can be read as soon as it is logged; False if another process writes it."""
    aside: ClassVar[str | None] = None
    """Pattern of the names that the target of an earlier run gets when a run starts at step 0 in
    the same folder; None if one target stores several runs, which the suite then reads."""
    cut_short: ClassVar[tuple[bytes, ...]] = ()
    """Ends that a killed process may leave in the last file that it wrote."""
    no_rows: ClassVar[tuple[bytes, ...]] = ()
    """Contents of the target, if it is a file, that a new run replaces since they have no row."""

    def rows(self, folder: Path) -> list[Row]:
        """Read the rows of the last run in a run folder, as ``run.history`` has them."""
        what = "read the rows that the logger wrote in this run folder, as a list of `Row`"
        raise NotImplementedError(f"{type(self).__name__}.rows(folder): {what}")

    def stored(self, value: float) -> float:
        """Return what the logger's format makes of a value: by default the value."""
        return value

    def unwritable(self, folder: Path) -> Any:
        """Make it impossible to write the target in a run folder; return the logger for it."""
        (folder / self.target).mkdir(parents=True)
        return self.instance()

    def test_it_has_the_role_of_an_observer(self) -> None:
        assert getattr(self.plugin, "role", None) == "observer"

    def test_the_rows_are_what_the_run_logged(self, tiny_run: TinyRun, tmp_path: Path) -> None:
        for periods in (
            {"length": 5, "validate_every": 4},
            {"length": 6, "validate_every": 3, "log_every": 1},
        ):
            folder = tmp_path / f"length_{periods['length']}"
            run = tiny_run(self.instance(), run_dir=folder, **periods)
            self._has(run, run.history)
            names = {name for row in self.rows(folder) for name in row}
            assert names >= {"step", "train/loss", "optim/lr", "train/tokens", "val/loss"}

    def test_values_are_exact_and_may_be_nan_or_infinite(self, tiny_run: TinyRun) -> None:
        run = tiny_run(self.instance(), LogsOddValues(), length=2, log_every=1)
        self._has(run, run.history)
        assert {"odd/nan", "odd/inf", "odd/-inf", "odd/1e+300"} <= run.history[0].keys()

    def test_a_row_can_be_read_as_soon_as_it_is_logged(self, tiny_run: TinyRun) -> None:
        seen: list[int] = []
        look = CallsAtSteps(at_safe_points=lambda run: seen.append(len(self.rows(run.folder))))
        if self.at_once:
            tiny_run(self.instance(), look, length=4, log_every=1)
            assert seen == [1, 2, 3, 4]

    def test_a_killed_process_loses_no_row(self, tmp_path: Path) -> None:
        if not self.at_once:
            return  # the process that writes may be behind
        names = {"module": self.plugin.__module__, "name": self.plugin.__name__}
        code = KILLED.format(folder=str(tmp_path), needs=self.needs, **names)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert [row["step"] for row in self.rows(tmp_path)] == [1, 2, 3]

    def test_a_resumed_run_has_every_row_once(self, tiny_run: TinyRun, tmp_path: Path) -> None:
        for number, end in enumerate((b"", *self.cut_short)):
            memory, folder = Memory(step=4), tmp_path / str(number)
            first = tiny_run(self.instance(), memory, length=8, log_every=1, run_dir=folder)
            before = _lines(folder / self.target)
            if end:
                with _last_file(folder / self.target).open("ab") as file:
                    file.write(end)
            again = tiny_run(self.instance(), memory, length=9, log_every=1, run_dir=folder)
            stay = [row for row in first.history if row["step"] <= 4]
            self._has(again, stay + again.history)
            after = _lines(folder / self.target)
            assert len([line for line in before if line not in after]) <= 4, "a row that stays"

    def test_a_run_that_is_resumed_twice_has_every_row_once(self, tiny_run: TinyRun) -> None:
        memory = Memory(step=2)
        for length in (3, 4, 5):
            run = tiny_run(self.instance(), memory, length=length, log_every=1)
        assert [row["step"] for row in self.rows(run.folder)] == [1, 2, 3, 4, 5]

    def test_a_row_that_the_run_logs_again_on_resuming_is_there_once(
        self, tiny_run: TinyRun
    ) -> None:
        memory = Memory(step=3)
        tiny_run(self.instance(), memory, length=5, log_every=1)
        assert memory.kept is not None
        memory.kept["progress"]["closed"] = False  # as a signal during the validation leaves it
        run = tiny_run(self.instance(), memory, length=5, log_every=1)
        assert [row["step"] for row in self.rows(run.folder)] == [1, 2, 3, 4, 5]

    def test_a_resumed_run_appends_to_a_file_without_later_rows(self, tiny_run: TinyRun) -> None:
        memory = Memory(step=4)
        run = tiny_run(self.instance(), memory, length=4, log_every=1)
        path = run.folder / self.target
        if path.is_file():
            before, inode = path.read_bytes(), path.stat().st_ino
            tiny_run(self.instance(), memory, length=6, log_every=1)
            assert path.read_bytes().startswith(before)
            assert path.stat().st_ino == inode

    def test_a_rewind_drops_the_rows_of_the_void_steps(self, tiny_run: TinyRun) -> None:
        seen: list[int] = []
        look = CallsAtSteps(at_step_starts=lambda run: seen.append(len(self.rows(run.folder))))
        listed = [look] if self.at_once else []
        run = tiny_run(Memory(step=3, later=6), *listed, self.instance(), length=7, log_every=1)
        assert seen == ([0, 1, 2, 3, 4, 5, 3, 4, 5, 6] if self.at_once else [])
        self._has(run, run.history)
        assert [row["step"] for row in self.rows(run.folder)] == list(range(1, 8))

    def test_a_run_from_step_0_in_the_same_folder_keeps_the_earlier_rows(
        self, tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
    ) -> None:
        before = []
        for _ in range(3):
            run = tiny_run(self.instance(), length=4, log_every=1)
            before.append(_contents(run.folder / self.target))
        assert _exact(self.rows(run.folder)) == self._exactly_stored(run.history)
        if self.aside is not None:
            aside = sorted(run.folder.glob(self.aside))
            assert [_contents(path) for path in aside] == before[:2]
            assert all(path.name in caplog.text for path in aside)

    def test_a_file_without_a_row_is_replaced(self, tiny_run: TinyRun, tmp_path: Path) -> None:
        for number, content in enumerate(self.no_rows):
            folder = tmp_path / str(number)
            folder.mkdir()
            (folder / self.target).write_bytes(content)
            run = tiny_run(self.instance(), length=2, log_every=1, run_dir=folder)
            self._has(run, run.history)

    def test_a_target_that_cannot_be_written_mutes_the_logger_and_the_run_goes_on(
        self, tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert tiny_run(self.unwritable(tmp_path / "run"), length=4).outcome == "finished"
        assert "failed and is muted" in caplog.text

    def test_it_changes_nothing_in_the_run_and_draws_no_random_number(
        self, tiny_run: TinyRun, tmp_path: Path
    ) -> None:
        states: list[str] = []
        look = CallsAtSteps(at_step_starts=lambda _: states.append(_random_states()))
        without = tiny_run(look, run_dir=tmp_path / "without")
        with_it = tiny_run(self.instance(), look, run_dir=tmp_path / "with")
        assert_same_weights(with_it, without)
        assert states[:4] == states[4:]

    def test_only_the_first_process_writes(self, tmp_path: Path) -> None:
        from fundamentallm import train

        train(compose_tiny(IsRank1(), self.instance(), length=4), run_dir=tmp_path)
        assert self._names(tmp_path) == []

    @pytest.mark.parametrize("kind", ["ddp"])  # a logger receives numbers only
    def test_two_processes_end_alike(self, two_processes: TwoProcesses, kind: str) -> None:
        first, _ = self.in_two_processes(two_processes, kind)
        assert first.outcome == "finished", first.error
        assert _exact(self.rows(first.folder)) == self._exactly_stored(first.history)
        assert self._names(first.folder) == [self.target]

    def test_no_file_stays_open(self, tiny_run: TinyRun, tmp_path: Path) -> None:
        # What torch and the logger's library leave open, they open in the first run.
        tiny_run(self.instance(), length=2, run_dir=tmp_path / "first")
        before = len([*Path("/dev/fd").iterdir()])
        tiny_run(self.instance(), length=2, run_dir=tmp_path / "second")
        assert len([*Path("/dev/fd").iterdir()]) == before

    def _has(self, run: Run, expected: list[Row]) -> None:
        """Fail unless the target has these rows, and the run folder nothing else of the logger."""
        assert _exact(self.rows(run.folder)) == self._exactly_stored(expected)
        assert self._names(run.folder) == [self.target]

    def _names(self, folder: Path) -> list[str]:
        stem = Path(self.target).stem
        return sorted(path.name for path in folder.iterdir() if stem in path.name)

    def _exactly_stored(self, rows: list[Row]) -> list[dict[str, str]]:
        return _exact(
            [
                {name: value if name == "step" else self.stored(value) for name, value in r.items()}
                for r in rows
            ]
        )


@plugin
class CallsAtSteps:
    """Calls a function at each step start or at each safe point."""

    at_step_starts: Any = None
    at_safe_points: Any = None

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        if self.at_step_starts is not None:
            self.at_step_starts(run)

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if self.at_safe_points is not None:
            self.at_safe_points(run)


@plugin
class LogsOddValues:
    """Logs values that some formats cannot hold."""

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        for value in (float("nan"), float("inf"), -float("inf"), 1e300, 5e-324, 0.1, 1 / 3, 2**53):
            run.log(f"odd/{value}", value)


@plugin
class IsRank1:
    """Makes this process the second one of a run."""

    @hookimpl
    def join_processes(self, run: Run) -> AbstractContextManager[None]:
        run.rank = 1
        return nullcontext()


def _exact(rows: list[Row]) -> list[dict[str, str]]:
    """Write each value out in full, so that NaN equals NaN."""
    return [{name: repr(float(value)) for name, value in row.items()} for row in rows]


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.is_file() else []


def _last_file(path: Path) -> Path:
    return max(one for one in (path, *path.rglob("*")) if one.is_file())


def _contents(path: Path) -> dict[str, bytes]:
    files = (one for one in (path, *path.rglob("*")) if one.is_file())
    return {str(one.relative_to(path)): one.read_bytes() for one in files}


def _random_states() -> str:
    import torch

    states = [str(random.getstate()), str(torch.get_rng_state().tolist())]
    if (numpy := sys.modules.get("numpy.random")) is not None:
        states.append(repr(numpy.get_state()))
    return "\n".join(states)
