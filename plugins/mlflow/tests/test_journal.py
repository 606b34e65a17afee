"""The journal: rows, torn ends, and what is news in it."""

from __future__ import annotations

import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fundamentallm_mlflow.journal import (
    Backpressure,
    Journal,
    JournalReader,
    LastSteps,
    Timeline,
    is_open,
)
from fundamentallm_mlflow.sync_state import SyncedRun, SyncState


def test_a_reader_yields_each_row_once_in_the_order_of_writing(tmp_path: Path) -> None:
    journal, reader = Journal(tmp_path / "j"), JournalReader(tmp_path / "j")
    journal.append("start")
    journal.append("metrics", step=1, metrics={"train/loss": 0.5})
    assert [row["kind"] for _, row in reader.rows()] == ["start", "metrics"]
    journal.append("end", outcome="finished", error=None)
    assert [row["kind"] for _, row in reader.rows()] == ["end"]
    assert list(reader.rows()) == []


def test_an_incomplete_row_is_read_after_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b'{"kind": "start", "ti')
    reader = JournalReader(path)
    assert list(reader.rows()) == []
    with path.open("ab") as file:
        file.write(b'me": 7}\n')
    assert list(reader.rows()) == [(0, {"kind": "start", "time": 7})]


def test_a_torn_row_costs_no_other_row(tmp_path: Path) -> None:
    path = tmp_path / "j"
    first = Journal(path)
    first.append("start")
    first.close()
    os.truncate(path, path.stat().st_size - 5)
    Journal(path).append("end", outcome="finished", error=None)
    assert [row["kind"] for _, row in JournalReader(path).rows()] == ["end"]


def test_nan_and_infinity_pass_through(tmp_path: Path) -> None:
    Journal(tmp_path / "j").append("metrics", step=1, metrics={"a": float("inf")})
    ((_, row),) = JournalReader(tmp_path / "j").rows()
    assert row["metrics"] == {"a": float("inf")}


@given(
    steps=st.lists(st.integers(1, 8), unique=True, min_size=1).map(sorted),
    deaths=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=4),
)
def test_metrics_of_repeated_steps_are_new_only_once(
    steps: list[int], deaths: list[tuple[int, int]]
) -> None:
    """Each process trains from a checkpoint up to its death; the last one to the end."""
    marks, news = LastSteps(), []
    processes = [(min(cut), max(cut)) for cut in deaths] + [(0, 8)]
    for start, stop in processes:
        for step in (s for s in steps if start < s <= stop):
            news += list(marks.new_metrics({"step": step, "metrics": {"a": 1.0}}))
            news += list(marks.new_metrics({"step": step, "metrics": {"b": 1.0}}))
    reached = max((stop for _, stop in processes[:-1]), default=0)
    assert news.count("a") == news.count("b") <= len(steps)
    if all(start == 0 for start, _ in processes) or not reached:
        assert news.count("a") == len(steps)


def test_append_returns_the_offset_of_the_row(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    wanted = [journal.append("start"), journal.append("metrics", step=1, metrics={})]
    assert [offset for offset, _ in JournalReader(tmp_path / "j").rows()] == wanted
    journal.drop(wanted[1])
    journal.append("end", outcome="failed", error=None)
    found = [(o, row["kind"]) for o, row in JournalReader(tmp_path / "j").rows()]
    assert found == [(0, "start"), (wanted[1], "end")]


def test_is_open_returns_whether_a_process_writes_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    assert is_open(tmp_path / "j")
    journal.close()
    assert not is_open(tmp_path / "j")


@given(st.lists(st.tuples(st.sampled_from(["start", "rewind"]), st.integers(0, 9)), max_size=5))
def test_the_valid_rows_are_those_of_a_file_that_drops_void_rows(
    turns: list[tuple[str, int]],
) -> None:
    """Each turn goes back to a step, or stays; then three steps follow."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "j"
        journal, step, file = Journal(path), 0, []
        for kind, back in [("start", 0), *turns]:
            step = min(step, back)
            file = [entry for entry in file if entry[0] <= step]
            journal.append(kind, step=step)
            for _ in range(3):
                step += 1
                offset = journal.append("metrics", step=step, metrics={"a": 1.0})
                file.append((step, offset))
        journal.close()
        timeline = Timeline(path)
        rows = [(o, row) for o, row in JournalReader(path).rows() if row["kind"] == "metrics"]
        assert [(row["step"], o) for o, row in rows if timeline.is_valid(o, row["step"])] == file


def test_waiting_rows_are_bounded_and_validations_are_never_left_out(tmp_path: Path) -> None:
    """Nothing is shipped: a hundred times the rows that may wait, each of 100 bytes."""
    limit, size, passed = 100_000, 0, []
    backpressure = Backpressure(tmp_path, limit)
    for row in range(100_000):
        validated = row % 1000 == 0
        if backpressure.accepts(size, validated=validated):
            passed.append(row)
            size += 100
    assert size <= limit * (1 + 1 / 64) + 100 * 100  # a look late, and the validations above it
    assert set(range(0, 100_000, 1000)) <= set(passed)
    assert passed[:500] == list(range(500))
    gaps = [later - earlier for earlier, later in pairwise(passed)]
    assert max(gaps) <= 1000


def test_all_rows_are_kept_again_when_the_store_has_caught_up(tmp_path: Path) -> None:
    backpressure = Backpressure(tmp_path, 1000)
    assert not all(backpressure.accepts(900, validated=False) for _ in range(16))
    state = SyncState(tmp_path)
    state.runs.append(SyncedRun("r", "1", "p", "e", [0], history=False, uploaded=950))
    state.save()
    assert all(backpressure.accepts(1000 + i, validated=False) for i in range(16))


def test_ten_thousand_rows_do_not_stay_in_memory(tmp_path: Path) -> None:
    journal, backpressure = Journal(tmp_path / "journal.jsonl"), Backpressure(tmp_path, 500_000)
    blocks = 0
    for step in range(1, 11_001):
        if backpressure.accepts(journal.size, validated=False):
            journal.append("metrics", step=step, metrics={f"m{n}": n / 10 for n in range(10)})
        if step == 1000:
            blocks = sys.getallocatedblocks()
    assert sys.getallocatedblocks() - blocks < 500
    assert journal.size < 600_000
    journal.close()
