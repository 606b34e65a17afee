"""``metrics.csv``: every row once, every number exact, whatever happened to the process."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundamentallm import hookimpl, plugin, train
from fundamentallm.testing import Memory, PluginContract, TinyRun, assert_same_weights, compose_tiny
from fundamentallm_csv import Csv
from fundamentallm_csv.table import Table

if TYPE_CHECKING:
    from fundamentallm import Run


class TestContract(PluginContract):
    plugin = Csv


@plugin
class LogsLate:
    """Logs a metric of its own from some step on."""

    since: int
    name: str = "late/metric"

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if run.progress.step >= self.since:
            run.log(self.name, run.progress.step / 3)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file, strict=True))
    assert all(None not in row and None not in row.values() for row in found)
    return found


def history(path: Path) -> list[dict[str, float]]:
    """What the table says, as the run itself has it."""
    return [
        {
            "step": int(row["step"]),
            **{name: float(cell) for name, cell in list(row.items())[3:] if cell},
        }
        for row in rows(path)
    ]


def steps(folder: Path) -> list[int]:
    return [int(row["step"]) for row in rows(folder / "metrics.csv")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "csv" in path.name)


def test_the_table_holds_exactly_what_the_run_logged(tiny_run: TinyRun) -> None:
    run = tiny_run(Csv(), length=5, validate_every=4)
    assert history(run.folder / "metrics.csv") == run.history
    found = rows(run.folder / "metrics.csv")
    assert [row["tokens"] for row in found] == [str(int(r["train/tokens"])) for r in run.history]
    assert [float(row["time"]) for row in found] == sorted(float(row["time"]) for row in found)


def test_it_says_the_same_as_the_journal_of_record(tiny_run: TinyRun) -> None:
    import json

    run = tiny_run(Csv(), "jsonl", length=6, validate_every=3, log_every=1)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    journal = [{"step": row["step"], **row["metrics"]} for row in map(json.loads, lines)]
    assert history(run.folder / "metrics.csv") == journal


def test_a_metric_that_appears_later_adds_a_column_at_the_end(tiny_run: TinyRun) -> None:
    run = tiny_run(Csv(), LogsLate(since=3), length=4, log_every=1)
    with (run.folder / "metrics.csv").open(newline="") as file:
        head = next(csv.reader(file))
    assert head[:3] == ["time", "step", "tokens"]
    first = [name for name in run.history[0] if name != "step"]
    assert head[3:] == [*first, "late/metric", "val/loss"]  # which comes at the end of the run
    found = rows(run.folder / "metrics.csv")
    assert [row["late/metric"] for row in found] == ["", "", "1.0", "1.3333333333333333"]
    assert names(run.folder) == ["metrics.csv"]


@pytest.mark.parametrize("name", ['a,"b"', "two\nlines", "car\rriage", "time", "step", "é", "x y"])
def test_names_of_every_kind_come_back(name: str, tiny_run: TinyRun) -> None:
    memory = Memory(step=3)
    for length in (5, 6):
        run = tiny_run(Csv(), memory, LogsLate(since=2, name=name), length=length, log_every=1)
    with (run.folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        head, *found = csv.reader(file)
    column = head.index(name, 3)
    assert [row[1] for row in found] == ["1", "2", "3", "4", "5", "6"]
    assert [row[column] for row in found] == ["", *(repr(step / 3) for step in range(2, 7))]


def test_every_row_is_there_as_soon_as_it_is_logged(tiny_run: TinyRun) -> None:
    seen: list[int] = []

    @plugin
    class Reads:
        @hookimpl
        def on_safe_point(self, run: Run) -> None:
            seen.append(len(steps(run.folder)))

    tiny_run(Csv(), Reads(), LogsLate(since=3), length=4, log_every=1)
    assert seen == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "end", [b"", b"1.5,6,2", b"1.5,4,16,1,1,1,1", b"\x00\x00\n", b"1.5,5\n", b"a,b,c,d,e,f,g\n"]
)
def test_a_resumed_run_has_every_step_once(end: bytes, tiny_run: TinyRun) -> None:
    memory = Memory(step=4)
    whole = tiny_run(Csv(), memory, length=8, log_every=1)
    path = whole.folder / "metrics.csv"
    before = path.read_bytes().splitlines()
    with path.open("ab") as file:
        file.write(end)
    again = tiny_run(Csv(), memory, length=9, log_every=1)
    assert steps(whole.folder) == list(range(1, 10))
    assert path.read_bytes().splitlines()[:5] == before[:5]
    assert history(path)[4:] == again.history
    assert names(whole.folder) == ["metrics.csv"]


def test_columns_outlive_the_rows_that_brought_them(tiny_run: TinyRun) -> None:
    memory = Memory(step=2)
    first = tiny_run(Csv(), memory, LogsLate(since=4), length=5, log_every=1)
    head = (first.folder / "metrics.csv").read_bytes().splitlines()[0]
    tiny_run(Csv(), memory, LogsLate(since=4), length=6, log_every=1)
    assert (first.folder / "metrics.csv").read_bytes().splitlines()[0] == head
    assert steps(first.folder) == [1, 2, 3, 4, 5, 6]


def test_a_row_that_the_run_logs_again_on_resuming_is_there_once(tiny_run: TinyRun) -> None:
    memory = Memory(step=3)
    tiny_run(Csv(), memory, length=5, log_every=1)
    assert memory.kept is not None
    memory.kept["progress"]["closed"] = False  # as a signal during the validation leaves it
    run = tiny_run(Csv(), memory, length=5, log_every=1)
    assert steps(run.folder) == [1, 2, 3, 4, 5]


def test_lines_that_stay_keep_their_bytes_and_their_file(tiny_run: TinyRun) -> None:
    memory = Memory(step=4)
    run = tiny_run(Csv(), memory, length=4, log_every=1)
    path = run.folder / "metrics.csv"
    before = path.read_bytes(), path.stat().st_ino
    tiny_run(Csv(), memory, length=6, log_every=1)
    assert path.read_bytes().startswith(before[0])
    assert path.stat().st_ino == before[1]


def test_a_run_from_step_0_in_the_same_folder_keeps_the_old_rows_beside(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    before = []
    for _ in range(3):
        run = tiny_run(Csv(), length=4, log_every=1)
        before.append((run.folder / "metrics.csv").read_bytes())
    assert steps(run.folder) == [1, 2, 3, 4]
    aside = sorted(run.folder.glob("metrics.before-*.csv"))
    assert [path.read_bytes() for path in aside] == before[:2]
    assert all(path.name in caplog.text for path in aside)


@pytest.mark.parametrize("junk", [b"", b"time,step", b"time,step,tokens,a\n", b"\x00"])
def test_what_holds_no_row_is_not_kept(junk: bytes, tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_bytes(junk)
    run = tiny_run(Csv(), length=2, log_every=1)
    assert steps(run.folder) == [1, 2]
    assert names(run.folder) == ["metrics.csv"]


@pytest.mark.parametrize(
    "foreign", [b"year;sales\n1999;3\n", b"\xff\xfe\n", b"x" * 200_000 + b"\n"]
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_file_of_someone_else_is_kept_beside(
    foreign: bytes, resumed: bool, tiny_run: TinyRun, tmp_path: Path
) -> None:
    memory = Memory(step=2)
    if resumed:
        tiny_run(memory, length=2)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "metrics.csv").write_bytes(foreign)
    run = tiny_run(Csv(), memory, length=4, log_every=1)
    assert steps(run.folder) == ([3, 4] if resumed else [1, 2, 3, 4])
    (kept,) = run.folder.glob("metrics.before-*.csv")
    assert kept.read_bytes() == foreign


def test_a_run_that_goes_back_drops_the_rows_of_the_void_steps(tiny_run: TinyRun) -> None:
    seen: list[list[int]] = []

    @plugin
    class Reads:
        @hookimpl
        def on_step_start(self, run: Run) -> None:
            seen.append(steps(run.folder))

    run = tiny_run(Memory(step=3, later=6), Reads(), Csv(), length=7, log_every=1)
    assert [len(found) for found in seen] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6]
    assert history(run.folder / "metrics.csv") == run.history
    assert names(run.folder) == ["metrics.csv"]


KILLED = """
import os
from pathlib import Path
from fundamentallm import hookimpl, plugin, train
from fundamentallm.testing import compose_tiny
from fundamentallm_csv import Csv

@plugin
class Dies:
    @hookimpl
    def on_safe_point(self, run):
        if run.progress.step == 3:
            os.kill(os.getpid(), 9)

train(compose_tiny(Csv(), Dies(), length=9, log_every=1), run_dir=Path({folder!r}))
"""


def test_a_killed_run_has_lost_no_row(tmp_path: Path) -> None:
    code = KILLED.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert steps(tmp_path) == [1, 2, 3]


def test_a_kill_while_a_column_is_added_leaves_the_table_as_it_was(tmp_path: Path) -> None:
    path, own = tmp_path / "metrics.csv", os.getpid
    table = Table(path, 0)
    table.append(["1.0", "1", "4"], {"a": 1.0})
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: os.kill(own(), signal.SIGKILL))
            table.append(["2.0", "2", "8"], {"b": 1.0})
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_bytes() == before
    table.append(["2.0", "2", "8"], {"b": 2.0})
    table.close()
    assert path.read_text() == "time,step,tokens,a,b\n1.0,1,4,1.0,\n2.0,2,8,,2.0\n"
    assert names(tmp_path) == ["metrics.csv"]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.dictionaries(st.text(), st.floats(), min_size=1, max_size=4), max_size=5))
def test_every_name_and_every_float_come_back(written: list[dict[str, float]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.csv"
        table = Table(path, 0)
        for step, metrics in enumerate(written):
            table.append(["1.0", str(step), "0"], metrics)
            table.reopen(step)  # as a run that is resumed does
        table.close()
        with path.open(newline="", encoding="utf-8") as file:
            head, *found = [*csv.reader(file)] or [[]]
    read = [
        {name: float(cell) for name, cell in zip(head[3:], row[3:], strict=True) if cell}
        for row in found
    ]
    assert [list(map(repr, (row[name] for name in sorted(row)))) for row in read] == [
        list(map(repr, (metrics[name] for name in sorted(metrics)))) for metrics in written
    ]
    assert [row.keys() for row in read] == [metrics.keys() for metrics in written]


def test_what_is_no_number_is_written_in_words(tmp_path: Path) -> None:
    table = Table(tmp_path / "metrics.csv", 0)
    table.append(["1.0", "1", "0"], {"a": math.nan, "b": math.inf, "c": -math.inf, "d": -0.0})
    table.close()
    assert (tmp_path / "metrics.csv").read_text().endswith(",NaN,Infinity,-Infinity,-0.0\n")


def test_a_file_that_cannot_be_written_is_a_warning_and_not_the_end(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run" / "metrics.csv").mkdir(parents=True)
    assert tiny_run(Csv(), length=4).outcome == "finished"
    assert "csv failed and is muted" in caplog.text


def test_it_changes_nothing_in_the_run(tiny_run: TinyRun, tmp_path: Path) -> None:
    with_it = tiny_run(Csv(), run_dir=tmp_path / "with")
    assert_same_weights(with_it, tiny_run(run_dir=tmp_path / "without"))


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    @plugin
    class Second:
        @hookimpl
        def build_tokenizer(self, run: Run) -> None:
            run.rank = 1

    train(compose_tiny(Second(), Csv(), length=4), run_dir=tmp_path)
    assert not (tmp_path / "metrics.csv").exists()


def test_no_file_stays_open(tiny_run: TinyRun, tmp_path: Path) -> None:
    tiny_run(Csv(), length=2)  # whatever torch opens, it opens now
    before = len([*Path("/dev/fd").iterdir()])
    tiny_run(Csv(), length=2, run_dir=tmp_path / "other")
    assert len([*Path("/dev/fd").iterdir()]) == before
