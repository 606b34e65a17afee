"""How busy the machine is, under the names that MLflow's page for it looks for.

What is seen is kept in ``system.jsonl`` in the folder of the journal, and goes into the store from
there. Its form is that of the journal, with a row for each look::

    {"kind": "system", "time": ms, "step": 3, "start": 0, "metrics": {"system/...": 12.5, ...}}

``step`` counts the looks of a run, ``start`` is the offset of the journal's ``start`` row of the
process that was looked at.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]

from fundamentallm_mlflow.journal import Journal, JournalReader, turns_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fundamentallm_mlflow.store import Point

FILE = "system.jsonl"
ASKED = "index,utilization.gpu,memory.used,memory.total,power.draw"
log = logging.getLogger("ship")


class SystemMetrics:
    """A look at CPU, memory and GPUs every ``seconds``, for the run with its journal in ``folder``,
    whether or not its store is there."""

    def __init__(self, folder: Path, pid: int, seconds: float) -> None:
        self._pid, self._seconds = pid, seconds
        starts = [
            (o, row) for o, row in turns_of(folder / "journal.jsonl") if row["kind"] == "start"
        ]
        self._since = starts[0][1]["time"] / 1000
        self._start = starts[-1][0]
        self._rows, self._step = _opened(folder / FILE)
        self._next = 0.0
        self._gpus = shutil.which("nvidia-smi")
        psutil.cpu_percent()  # what follows is since the call before

    def look(self) -> None:
        """Add a row, in one write, if it is time for that."""
        now = time.time()
        if self._rows is None or now < self._next:
            return
        self._next = now + self._seconds
        # From the clock: it goes on over all processes of a run. Never one that was there.
        self._step = max(self._step + 1, int((now - self._since) / self._seconds))
        found = _host(self._pid) | self._devices()
        metrics = {f"system/{key}": value for key, value in found.items()}
        try:
            self._rows.append("system", step=self._step, start=self._start, metrics=metrics)
        except OSError:
            log.exception("%s takes no more rows: the machine is not looked at from here on", FILE)
            self._rows.close()
            self._rows = None

    def _devices(self) -> dict[str, float]:
        if self._gpus is None:
            return {}
        words = [self._gpus, f"--query-gpu={ASKED}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            log.exception("nvidia-smi tells nothing: GPUs are left out from here on")
            self._gpus = None
            return {}
        return {key: value for line in done.stdout.splitlines() for key, value in _device(line)}


def seen(
    folder: Path, offset: int, first: int, end: int | None
) -> Iterator[tuple[int, list[Point]]]:
    """Yield what was seen of the processes that began at ``first`` or later and before ``end``:
    the points of each row from ``offset`` on, and the offset behind it."""
    if not (folder / FILE).is_file():
        return
    # One that was deleted or cut meanwhile is read anew.
    reader = JournalReader(folder / FILE, offset if offset <= (folder / FILE).stat().st_size else 0)
    for row in _looks(reader):
        is_own = row["start"] >= first and (end is None or row["start"] < end)
        metrics = row["metrics"] if is_own else {}
        yield reader.offset, [(k, v, row["time"], row["step"]) for k, v in metrics.items()]


def _opened(path: Path) -> tuple[Journal | None, int]:
    """Return the file to add to, if it takes anything, and the last step in it."""
    try:
        rows = Journal(path)
    except OSError:
        log.exception("%s cannot be written: the machine is not looked at", path)
        return None, -1
    return rows, max((row["step"] for row in _looks(JournalReader(path))), default=-1)


def _looks(reader: JournalReader) -> Iterator[dict[str, Any]]:
    """Yield the rows that are what this process writes: a damaged file keeps nothing else back."""
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
    if len(texts) != ASKED.count(","):  # words on what is wrong
        return []
    numbers = [float(t) if t.replace(".", "", 1).isdigit() else None for t in texts]
    used, total = numbers[1], numbers[2]
    found = {
        "utilization_percentage": numbers[0],
        "memory_usage_megabytes": None if used is None else used * 1.048576,
        "memory_usage_percentage": 100 * used / total if used is not None and total else None,
        "power_usage_watts": numbers[3],
    }
    return [(f"gpu_{index}_{key}", value) for key, value in found.items() if value is not None]
