"""``metrics.csv``: every row once, every number exact, whatever happened to the process."""

from __future__ import annotations

import csv
import math
import os
import signal
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundamentallm import hookimpl, plugin
from fundamentallm.testing import LoggerContract, Memory, TinyRun
from fundamentallm_csv import Csv
from fundamentallm_csv.table import Table

if TYPE_CHECKING:
    from fundamentallm import Run


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


class TestContract(LoggerContract):
    plugin = Csv
    target = "metrics.csv"
    aside = "metrics.before-*.csv"
    cut_short = (
        b"1.5,6,2",
        b"1.5,4,16,1,1,1,1",
        b"\x00\x00\n",
        b"1.5,5\n",
        b"a,b,c,d,e,f,g\n",
    )
    no_rows = (b"", b"time,step", b"time,step,tokens,a\n", b"\x00")

    def rows(self, folder: Path) -> list[dict[str, float]]:
        return history(folder / self.target)


def steps(folder: Path) -> list[int]:
    return [int(row["step"]) for row in rows(folder / "metrics.csv")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "csv" in path.name)


def test_a_row_begins_with_its_time_and_the_tokens_trained_on(tiny_run: TinyRun) -> None:
    memory = Memory(step=3, later=6)
    run = tiny_run(Csv(), memory, length=7, validate_every=4, log_every=1)
    found = rows(run.folder / "metrics.csv")
    assert [row["tokens"] for row in found] == [str(int(r["train/tokens"])) for r in run.history]
    assert [float(row["time"]) for row in found] == sorted(float(row["time"]) for row in found)


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
def test_names_with_any_characters_can_be_read_back(name: str, tiny_run: TinyRun) -> None:
    memory = Memory(step=3)
    for length in (5, 6):
        run = tiny_run(Csv(), memory, LogsLate(since=2, name=name), length=length, log_every=1)
    with (run.folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        head, *found = csv.reader(file)
    column = head.index(name, 3)
    assert [row[1] for row in found] == ["1", "2", "3", "4", "5", "6"]
    assert [row[column] for row in found] == ["", *(repr(step / 3) for step in range(2, 7))]


def test_columns_stay_when_the_rows_that_added_them_are_dropped(tiny_run: TinyRun) -> None:
    memory = Memory(step=2)
    first = tiny_run(Csv(), memory, LogsLate(since=4), length=5, log_every=1)
    head = (first.folder / "metrics.csv").read_bytes().splitlines()[0]
    tiny_run(Csv(), memory, LogsLate(since=4), length=6, log_every=1)
    assert (first.folder / "metrics.csv").read_bytes().splitlines()[0] == head
    assert steps(first.folder) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "foreign", [b"year;sales\n1999;3\n", b"\xff\xfe\n", b"x" * 200_000 + b"\n"]
)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_file_of_another_program_is_kept_under_another_name(
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


def test_the_folder_is_synced_after_a_column_was_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(tmp_path / "metrics.csv", 0)
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(S_ISDIR(os.fstat(file).st_mode)))
    table.append(["1.0", "1", "4"], {"a": 1.0})
    table.append(["2.0", "2", "8"], {"a": 1.0})
    table.close()
    assert synced == [False, True]


def test_a_kill_while_a_column_is_added_leaves_the_old_table(tmp_path: Path) -> None:
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
def test_every_name_and_every_float_can_be_read_back(written: list[dict[str, float]]) -> None:
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


def test_values_that_are_no_number_are_written_in_words(tmp_path: Path) -> None:
    table = Table(tmp_path / "metrics.csv", 0)
    table.append(["1.0", "1", "0"], {"a": math.nan, "b": math.inf, "c": -math.inf, "d": -0.0})
    table.close()
    assert (tmp_path / "metrics.csv").read_text().endswith(",NaN,Infinity,-Infinity,-0.0\n")
