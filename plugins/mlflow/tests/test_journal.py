"""The journal: rows, torn ends, and what is news in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from fundamentallm_mlflow.journal import Journal, JournalReader, Marks

if TYPE_CHECKING:
    from pathlib import Path


def test_a_reader_gets_each_row_once_in_the_order_of_writing(tmp_path: Path) -> None:
    journal, reader = Journal(tmp_path / "j"), JournalReader(tmp_path / "j")
    journal.append("start")
    journal.append("metrics", step=1, metrics={"train/loss": 0.5})
    assert [row["kind"] for row in reader.rows()] == ["start", "metrics"]
    journal.append("end", outcome="finished", error=None)
    assert [row["kind"] for row in reader.rows()] == ["end"]
    assert list(reader.rows()) == []


def test_half_a_row_is_not_read_before_its_other_half_is_there(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b'{"kind": "start", "ti')
    reader = JournalReader(path)
    assert list(reader.rows()) == []
    with path.open("ab") as file:
        file.write(b'me": 7}\n')
    assert list(reader.rows()) == [{"kind": "start", "time": 7}]


def test_a_torn_row_costs_no_other_row(tmp_path: Path) -> None:
    path = tmp_path / "j"
    Journal(path).append("start")
    os.truncate(path, path.stat().st_size - 5)
    Journal(path).append("end", outcome="finished", error=None)
    assert [row["kind"] for row in JournalReader(path).rows()] == ["end"]


def test_nan_and_infinity_pass_through(tmp_path: Path) -> None:
    Journal(tmp_path / "j").append("metrics", step=1, metrics={"a": float("inf")})
    (row,) = JournalReader(tmp_path / "j").rows()
    assert row["metrics"] == {"a": float("inf")}


@given(
    steps=st.lists(st.integers(1, 8), unique=True, min_size=1).map(sorted),
    deaths=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=4),
)
def test_runs_that_are_cut_short_and_resumed_are_news_once(
    steps: list[int], deaths: list[tuple[int, int]]
) -> None:
    """Each process trains from a checkpoint up to its death; the last one to the end."""
    marks, news = Marks(), []
    processes = [(min(cut), max(cut)) for cut in deaths] + [(0, 8)]
    for start, stop in processes:
        for step in (s for s in steps if start < s <= stop):
            news += list(marks.news({"step": step, "metrics": {"a": 1.0}}))
            news += list(marks.news({"step": step, "metrics": {"b": 1.0}}))
    reached = max((stop for _, stop in processes[:-1]), default=0)
    assert news.count("a") == news.count("b") <= len(steps)
    if all(start == 0 for start, _ in processes) or not reached:
        assert news.count("a") == len(steps)
