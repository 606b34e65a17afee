"""The journal: the training process appends rows, the upload worker reads them.

One JSON object per line, ``kind`` first::

    {"kind": "start", "time": ms, "step": 0, "parameters": {...}, ...}   a process began to train
    {"kind": "metrics", "time": ms, "step": 50, "metrics": {...}}        a log row
    {"kind": "rewind", "time": ms, "step": 40, "left": 50}               the run went back
    {"kind": "checkpoint", "time": ms, "step": 40, "folder": "..."}      a checkpoint is durable
    {"kind": "end", "time": ms, "outcome": "finished", "error": null}

``time`` is in milliseconds since 1970. The content of the store depends on this file alone.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import json
import logging
import os
import time
import weakref
from typing import TYPE_CHECKING, Any

from fundamentallm_mlflow.sync_state import uploaded_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# As ``append`` writes them: the bytes are compared without parsing the row.
_TURNS = (b'{"kind": "start"', b'{"kind": "rewind"')
CHECKS = 64  # how often the backlog is measured while the journal grows by its limit

log = logging.getLogger("fundamentallm")


class Journal:
    """The writing end. A row is one write to the operating system, so it survives a ``kill -9``.

    An open journal is locked, which shows other processes that the training is running.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # O_APPEND: the next row follows the last one, also after ``drop`` has shortened the file.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o644)
        with contextlib.suppress(BlockingIOError):  # another process reads or still has it
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The lock belongs to the open file: in a forked process it would outlive this one.
        close_in_forks(self.close)
        self.size = os.fstat(self._file).st_size
        if self.size and os.pread(self._file, 1, self.size - 1) != b"\n":
            self.size += os.write(self._file, b"\n")  # a power cut left half a line

    def append(self, kind: str, **facts: Any) -> int:
        """Add a row and return its offset; raise ``OSError`` if the disk does not take it."""
        row = {"kind": kind, "time": time.time_ns() // 1_000_000, **facts}
        line = (json.dumps(row) + "\n").encode()
        offset, written = self.size, os.write(self._file, line)
        self.size += written
        if written < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return offset

    def drop(self, offset: int) -> None:
        """Remove the rows from ``offset`` on."""
        os.ftruncate(self._file, offset)
        self.size = offset

    def close(self) -> None:
        """Close the file; all rows are written already."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def close_in_forks(close: Callable[[], None]) -> None:
    """Call a method in every process that is forked from this one, as long as its object exists.

    Data loaders and user code fork. A copy of a pipe keeps it open, and a copy of a locked file
    keeps it locked; O_CLOEXEC does not help, since a fork executes no program.
    """
    method = weakref.WeakMethod(close)

    def call() -> None:
        found = method()
        if found is not None:
            found()

    os.register_at_fork(after_in_child=call)


class JournalReader:
    """The reading end; ``offset`` is behind the last row that was read."""

    def __init__(self, path: Path, offset: int = 0, stop: int | None = None) -> None:
        self._path = path
        self._stop = stop
        self.offset = offset

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the complete rows from ``offset`` on, each with its own offset."""
        with self._path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                here = self.offset
                # A line without an end is still being written; the next call reads it.
                if not line.endswith(b"\n") or (self._stop is not None and here >= self._stop):
                    return
                self.offset += len(line)
                row = _parsed(line)
                if row is not None:
                    yield here, row


class LastSteps:
    """The last step of every metric.

    A resumed run trains some steps a second time. Their metrics are in the journal twice, and only
    the first value goes to MLflow, which would keep both.
    """

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}

    def new_metrics(self, row: dict[str, Any]) -> dict[str, float]:
        """Return the metrics of a row whose step is greater than in every row before it."""
        step = row["step"]
        fresh = {k: v for k, v in row["metrics"].items() if step > self._steps.get(k, -1)}
        self._steps.update(dict.fromkeys(fresh, step))
        return fresh


class Timeline:
    """Which rows before ``until`` are still valid.

    A start or a rewind at a step makes the earlier rows of later steps void.
    """

    def __init__(self, journal: Path, until: int | None = None) -> None:
        turns = list(starts_and_rewinds(journal, until))
        self._offsets = [offset for offset, _ in turns]
        self._steps: list[int] = []
        lowest = 1 << 62
        # From the last one back: a row is void if any later turn goes back to an earlier step.
        for _, row in reversed(turns):
            lowest = min(lowest, int(row["step"]))
            self._steps.insert(0, lowest)

    def is_valid(self, offset: int, step: int) -> bool:
        """Return whether the row of ``step`` at ``offset`` is still part of the run."""
        place = bisect.bisect_right(self._offsets, offset)
        return place == len(self._steps) or step <= self._steps[place]


class Backpressure:
    """Decides which rows are written once more than half of ``limit`` bytes wait for the store.

    The share of rows that are written halves whenever the space that is left does, so that the
    missing rows are spread over the whole outage. Rows with a validation are always written.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._next_check = 0
        self._every = 1
        self._row = 0
        self._warned = False

    def accepts(self, size: int, *, validated: bool) -> bool:
        """Return whether to write a row to the journal, which has ``size`` bytes now."""
        if size >= self._next_check:
            self._check(size)
        self._row += 1
        return validated or not self._row % self._every

    def _check(self, size: int) -> None:
        # The upload state is a file: reading it for every row would cost more than the row.
        self._next_check = size + max(1, self._limit // CHECKS)
        free = 1 - (size - uploaded_bytes(self._folder)) / self._limit
        self._every = 1
        while free <= 0.5 / self._every and self._every < 1 << 20:
            self._every *= 2
        if self._every > 1 and not self._warned:
            self._warned = True
            log.warning(
                "mlflow: %d MB wait for the store: from now on MLflow gets fewer of the "
                "training rows, and all validations",
                self._limit >> 21,
            )


def starts_and_rewinds(
    journal: Path, until: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the ``start`` and ``rewind`` rows with their offsets, up to the one at ``until``."""
    offset = 0
    with journal.open("rb") as file:
        for line in file:
            if until is not None and offset > until:
                return
            # Parsing every row of a long run would take seconds.
            if line.startswith(_TURNS) and line.endswith(b"\n"):
                row = _parsed(line)
                if row is not None:
                    yield offset, row
            offset += len(line)


def is_open(journal: Path) -> bool:
    """Return whether a running process writes the journal."""
    with journal.open("rb") as file:
        try:
            # Shared, so that two readers do not take each other for the training process.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None  # half a line, from a power cut
    return row if isinstance(row, dict) and "kind" in row else None
