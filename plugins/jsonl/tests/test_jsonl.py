"""``metrics.jsonl``: every row once, every line JSON, whatever happened to the process."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundamentallm import hookimpl, plugin
from fundamentallm.testing import LoggerContract, Memory, TinyRun
from fundamentallm_jsonl import Jsonl, drop_rows_after

if TYPE_CHECKING:
    from fundamentallm import Run


def refuse(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


class TestContract(LoggerContract):
    plugin = Jsonl
    target = "metrics.jsonl"
    aside = "metrics.jsonl.before-*"
    cut_short = (b'{"time": 1.5, "step": 6, "tok', b"\x00\x00\n", b"[]\n")
    no_rows = (b"", b'{"time": 1.5, "st', b'{"step": Infinity}\n', b"\x00")

    def rows(self, folder: Path) -> list[dict[str, float]]:
        return [
            {"step": row["step"], **{name: float(v) for name, v in row["metrics"].items()}}
            for row in rows(folder)
        ]


def test_a_row_begins_with_its_time_and_the_tokens_trained_on(tiny_run: TinyRun) -> None:
    run = tiny_run(Memory(step=3, later=6), Jsonl(), length=7, log_every=1)
    found = rows(run.folder)
    assert [list(row) for row in found] == [["time", "step", "tokens", "metrics"]] * len(found)
    assert [row["tokens"] for row in found] == [4, 8, 12, 28, 32, 36, 40]
    assert [row["tokens"] for row in found] == [int(r["train/tokens"]) for r in run.history]
    assert [row["time"] for row in found] == sorted(row["time"] for row in found)


def test_the_rows_of_a_resumed_run_are_later_than_those_it_drops(tiny_run: TinyRun) -> None:
    memory = Memory(step=4)
    run = tiny_run(Jsonl(), memory, length=8, log_every=1)
    before = rows(run.folder)
    tiny_run(Jsonl(), memory, length=9, log_every=1)
    after = rows(run.folder)
    assert after[:4] == before[:4]
    assert after[4]["time"] > before[7]["time"]


def test_the_file_of_an_earlier_run_has_the_time_in_its_name(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        run = tiny_run(Jsonl(), length=4, log_every=1)
    (aside,) = run.folder.glob("metrics.jsonl.before-*")
    assert aside.name.removeprefix("metrics.jsonl.before-").isdecimal()
    assert f"metrics.jsonl held are now in {aside.name}" in caplog.text


def test_a_row_without_its_line_end_is_kept(tiny_run: TinyRun) -> None:
    memory = Memory(step=4)
    run = tiny_run(Jsonl(), memory, length=4, log_every=1)
    path = run.folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    tiny_run(Jsonl(), memory, length=6, log_every=1)
    assert [row["step"] for row in rows(run.folder)] == [1, 2, 3, 4, 5, 6]


def test_the_folder_is_synced_after_rows_were_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    synced: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(S_ISDIR(os.fstat(file).st_mode)))
    drop_rows_after(2, path)
    assert synced == []
    drop_rows_after(1, path)
    assert synced == [False, True]
    assert path.read_text() == '{"step": 1}\n'


def test_a_temporary_file_of_a_killed_process_with_the_same_number_is_no_error(
    tiny_run: TinyRun,
) -> None:
    memory, number, own_number = Memory(step=2), os.getpid(), os.getpid
    run = tiny_run(Jsonl(), memory, length=4, log_every=1)
    child = os.fork()
    if child == 0:  # in a container, process numbers begin again at 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: number)
            patch.setattr(os, "fsync", lambda _: os.kill(own_number(), signal.SIGKILL))
            drop_rows_after(2, run.folder / "metrics.jsonl")
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len([path for path in run.folder.iterdir() if "jsonl" in path.name]) == 2
    tiny_run(Jsonl(), memory, length=6, log_every=1)
    assert [row["step"] for row in rows(run.folder)] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in run.folder.iterdir() if "jsonl" in path.name] == ["metrics.jsonl"]


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.floats()))
def test_every_float_can_be_read_back_from_valid_json(metrics: dict[str, float]) -> None:
    from fundamentallm_jsonl import row

    line = row(1, 2, metrics)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    found = json.loads(line, parse_constant=refuse)["metrics"]
    assert found.keys() == metrics.keys()
    for name, value in metrics.items():
        again = float(found[name])
        assert again == value or (math.isnan(again) and math.isnan(value))


def test_ten_thousand_rows_do_not_stay_in_memory(tiny_run: TinyRun, tmp_path: Path) -> None:
    run, one = tiny_run(length=2), Jsonl()
    one.on_train_start(run)
    blocks = 0
    for step in range(1, 11_001):
        run.progress.step = step
        one.on_log(run, {f"train/m{n}": step + n / 10 for n in range(10)})
        if step == 1000:
            blocks = sys.getallocatedblocks()
    assert sys.getallocatedblocks() - blocks < 500
    one.on_train_end()
    assert len((run.folder / "metrics.jsonl").read_bytes().splitlines()) == 11_000


@plugin
class Counts:
    """Hands over a histogram with every row."""

    @hookimpl
    def on_log(self, run: Run) -> None:
        edges, counts = [-1.0, 0.0, 1.0], [2, run.rank]
        step = run.progress.step
        run.hook.on_histogram(run=run, name="sizes/a", step=step, edges=edges, counts=counts)


def histograms(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "histograms.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_histograms_are_written_exactly(tiny_run: TinyRun) -> None:
    run = tiny_run(Counts(), Jsonl(), length=3, log_every=1)
    found = histograms(run.folder)
    assert [list(one) for one in found] == [["time", "step", "name", "edges", "counts"]] * 3
    assert [one["step"] for one in found] == [1, 2, 3]
    assert [(o["name"], o["edges"], o["counts"]) for o in found] == [
        ("sizes/a", [-1.0, 0.0, 1.0], [2, 0])
    ] * 3


def test_a_run_without_histograms_has_no_file_for_histograms(tiny_run: TinyRun) -> None:
    assert not (tiny_run(Jsonl(), length=3).folder / "histograms.jsonl").exists()


@pytest.mark.parametrize("closed", [True, False])
def test_a_resumed_run_has_every_histogram_once(closed: bool, tiny_run: TinyRun) -> None:
    memory = Memory(step=4)
    run = tiny_run(Counts(), Jsonl(), memory, length=6, log_every=1)
    with (run.folder / "histograms.jsonl").open("ab") as file:
        file.write(b'{"time": 1.5, "step": 3, "na')
    assert memory.kept is not None
    memory.kept["progress"]["closed"] = closed
    tiny_run(Counts(), Jsonl(), memory, length=7, log_every=1)
    assert [one["step"] for one in histograms(run.folder)] == list(range(1, 8))


def test_a_rewind_drops_the_histograms_of_later_steps(tiny_run: TinyRun) -> None:
    run = tiny_run(Memory(step=3, later=6), Counts(), Jsonl(), length=7, log_every=1)
    assert [one["step"] for one in histograms(run.folder)] == list(range(1, 8))


def test_a_run_from_step_0_keeps_the_earlier_histograms(tiny_run: TinyRun) -> None:
    for _ in range(2):
        run = tiny_run(Counts(), Jsonl(), length=3, log_every=1)
    assert [one["step"] for one in histograms(run.folder)] == [1, 2, 3]
    (aside,) = run.folder.glob("histograms.jsonl.before-*")
    assert len(aside.read_bytes().splitlines()) == 3


def test_a_histogram_for_a_process_that_writes_nothing_is_no_error(tmp_path: Path) -> None:
    Jsonl().on_histogram("sizes/a", 1, [0.0, 1.0], [3])
