"""A long run whose rows come at the pace of a real one: nothing is thinned, nothing waits long."""

from __future__ import annotations

import ctypes
import json
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from fundamentallm import hookimpl, plugin, state
from fundamentallm.testing import TinyRun
from fundamentallm_mlflow import Mlflow
from fundamentallm_mlflow.sync_state import uploaded_bytes

if TYPE_CHECKING:
    from fundamentallm import Run

A_SECOND = 500
LOOKS = 20
WAITING_MB = 4.0  # of half of it on, which comes in some ten seconds, rows are thinned
PER_STEP = 7  # metrics, in addition to train/loss, train/tokens and optim/lr


@plugin
class Pace:
    """Logs seven metrics of its own in every step, holds the pace, and looks around now and then."""

    every: int
    """Steps between two looks."""
    waiting: list[int] = state(factory=list)
    memory: list[int] = state(factory=list)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Begin to count."""
        self._due = time.monotonic()

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        """Log, look, and wait for the next step's time; what is late is not made up for."""
        step = run.progress.step
        for n in range(PER_STEP):
            run.log(f"train/m{n}", step + n / 10)
        if step % self.every == 0:
            self._look(run)
        now = time.monotonic()
        self._due = max(self._due + 1 / A_SECOND, now)
        time.sleep(self._due - now)

    def _look(self, run: Run) -> None:
        folder = run.folder / "mlflow"
        self.waiting.append((folder / "journal.jsonl").stat().st_size - uploaded_bytes(folder))
        ctypes.CDLL(None).malloc_trim(0)  # what is free is not held
        self.memory.append(psutil.Process().memory_info().rss)


@pytest.mark.parametrize("rows", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_rows_of_ten_metrics_at_a_steady_pace_are_all_uploaded_while_they_come(
    look: Any, tiny_run: TinyRun, caplog: pytest.LogCaptureFixture, rows: int
) -> None:
    pace, name = Pace(every=rows // LOOKS), f"long-{rows}"
    one = Mlflow(
        experiment=name, waiting_mb=WAITING_MB, plot=False, start_seconds=120.0, end_seconds=200.0
    )
    run = tiny_run(one, "jsonl", pace, length=rows, log_every=1, validate_every=rows // LOOKS)
    journal = (run.folder / "mlflow" / "journal.jsonl").read_text().splitlines()
    sent = [row for row in map(json.loads, journal) if row["kind"] == "metrics"]
    kept = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in kept] == list(range(1, rows + 1))
    assert min(len(row["metrics"]) for row in kept) == 3 + PER_STEP
    assert [(r["step"], r["metrics"]) for r in sent] == [(r["step"], r["metrics"]) for r in kept]
    assert "fewer of the training rows" not in caplog.text

    stored = look.run(name)
    assert stored.info.status == "FINISHED"
    for metric in {metric for row in kept for metric in row["metrics"]}:
        wanted = [(r["step"], r["metrics"][metric]) for r in kept if metric in r["metrics"]]
        assert look.points(stored, metric) == wanted, metric

    assert len(pace.waiting) == LOOKS
    assert max(pace.waiting) < WAITING_MB / 2 * 1e6, pace.waiting
    assert max(pace.memory) - pace.memory[0] < 10_000_000, pace.memory
