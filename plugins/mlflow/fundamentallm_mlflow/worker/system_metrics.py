"""Measure CPU, memory and GPUs, under the names that MLflow's page for system metrics expects.

The measurements go to ``system.jsonl`` in the folder of the journal, and from there to the store.
The format is that of the journal, with one row for each measurement::

    {"kind": "system", "time": ms, "step": 3, "start": 0, "metrics": {"system/...": 12.5, ...}}

``step`` is the number of intervals since the run began. ``start`` is the offset of the journal's
``start`` row of the measured process.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]

from fundamentallm_mlflow.journal import Journal, JournalReader, starts_and_rewinds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fundamentallm_mlflow.worker.client import Point

FILE = "system.jsonl"
FIELDS = "index,utilization.gpu,memory.used,memory.total,power.draw"
log = logging.getLogger("worker")


class SystemMetrics:
    """Measures every ``seconds`` for the run with its journal in ``folder``.

    It writes to a file, so an unreachable store loses no measurement.
    """

    def __init__(self, folder: Path, pid: int, seconds: float) -> None:
        self._pid, self._seconds = pid, seconds
        turns = starts_and_rewinds(folder / "journal.jsonl")
        starts = [(offset, row) for offset, row in turns if row["kind"] == "start"]
        self._since = starts[0][1]["time"] / 1000
        self._start = starts[-1][0]
        self._rows, self._step = _opened(folder / FILE)
        self._next = 0.0
        self._gpus = shutil.which("nvidia-smi")
        psutil.cpu_percent()  # a call returns the mean since the call before it

    def measure(self) -> None:
        """Add a row, in one write, if the interval has passed."""
        now = time.time()
        if self._rows is None or now < self._next:
            return
        self._next = now + self._seconds
        # From the clock, so that it continues over all processes of a run; never a step twice.
        self._step = max(self._step + 1, int((now - self._since) / self._seconds))
        found = _host(self._pid) | self._devices()
        metrics = {f"system/{key}": value for key, value in found.items()}
        try:
            self._rows.append("system", step=self._step, start=self._start, metrics=metrics)
        except OSError:
            log.exception("%s cannot be written: the machine is no longer measured", FILE)
            self._rows.close()
            self._rows = None

    def _devices(self) -> dict[str, float]:
        if self._gpus is None:
            return {}
        words = [self._gpus, f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            log.exception("nvidia-smi fails: GPUs are no longer measured")
            self._gpus = None
            return {}
        return {key: value for line in done.stdout.splitlines() for key, value in _device(line)}


def measurements(
    folder: Path, offset: int, first: int, end: int | None
) -> Iterator[tuple[int, list[Point]]]:
    """Yield the points of each row from ``offset`` on, with the offset behind the row.

    Rows of processes that started before ``first`` or from ``end`` on have no points.
    """
    if not (folder / FILE).is_file():
        return
    # A file that was deleted or truncated in the meantime is read from its start.
    reader = JournalReader(folder / FILE, offset if offset <= (folder / FILE).stat().st_size else 0)
    for row in _rows(reader):
        is_own = row["start"] >= first and (end is None or row["start"] < end)
        metrics = row["metrics"] if is_own else {}
        yield reader.offset, [(k, v, row["time"], row["step"]) for k, v in metrics.items()]


def _opened(path: Path) -> tuple[Journal | None, int]:
    """Return the file to append to, None if it cannot be written, and its last step."""
    try:
        rows = Journal(path)
    except OSError:
        log.exception("%s cannot be written: the machine is not measured", path)
        return None, -1
    return rows, max((row["step"] for row in _rows(JournalReader(path))), default=-1)


def _rows(reader: JournalReader) -> Iterator[dict[str, Any]]:
    """Yield the rows that have the right form; a damaged row must not stop the upload."""
    for _, row in reader.rows():
        metrics = row.get("metrics")
        numbers = metrics.values() if isinstance(metrics, dict) else [None]
        if all(type(row.get(key)) is int for key in ("time", "step", "start")) and all(
            type(number) in (int, float) for number in numbers
        ):
            yield row


def _host(pid: int) -> dict[str, float]:
    memory = psutil.virtual_memory()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
    }
    with contextlib.suppress(psutil.Error):  # it may just have ended
        found["training_memory_megabytes"] = psutil.Process(pid).memory_info().rss / 1e6
    return found


def _device(line: str) -> list[tuple[str, float]]:
    """Return the numbers of one line; a device may not know all of them (``[N/A]``)."""
    index, *texts = (text.strip() for text in line.split(","))
    if len(texts) != FIELDS.count(","):  # words on what is wrong
        return []
    numbers = [float(t) if t.replace(".", "", 1).isdigit() else None for t in texts]
    # nvidia-smi reports MiB, and the metric is in MB.
    used, total = numbers[1], numbers[2]
    found = {
        "utilization_percentage": numbers[0],
        "memory_usage_megabytes": None if used is None else used * 1.048576,
        "memory_usage_percentage": 100 * used / total if used is not None and total else None,
        "power_usage_watts": numbers[3],
    }
    return [(f"gpu_{index}_{key}", value) for key, value in found.items() if value is not None]
