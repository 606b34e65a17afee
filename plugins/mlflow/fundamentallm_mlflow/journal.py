"""The journal between the training process, which only appends, and the process that ships.

One JSON object per line, ``kind`` first::

    {"kind": "start", "time": ms, "step": 0, "parameters": {...}, ...}   a process began to train
    {"kind": "metrics", "time": ms, "step": 50, "metrics": {...}}        a log row
    {"kind": "rewind", "time": ms, "step": 40, "left": 50}               the run went back
    {"kind": "checkpoint", "time": ms, "step": 40, "folder": "..."}      a checkpoint is durable
    {"kind": "end", "time": ms, "outcome": "finished", "error": null}

``time`` is in milliseconds since 1970. What is in the store is a function of this file alone.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import json
import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_TURNS = (b'{"kind": "start"', b'{"kind": "rewind"')


class Journal:
    """The writing end. A row is one write to the operating system: it survives a ``kill -9``.

    While it is open it holds a lock on the file, which tells others that the training is alive.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o644)
        with contextlib.suppress(BlockingIOError):  # a worker of a killed process holds it still
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        """Take back the rows from ``offset`` on, as if they had not been written."""
        os.ftruncate(self._file, offset)
        self.size = offset

    def close(self) -> None:
        """Let go of the file; nothing is left to be written."""
        os.close(self._file)


class JournalReader:
    """The reading end, at ``offset``: up to there it has handed out whole rows."""

    def __init__(self, path: Path, offset: int = 0, stop: int | None = None) -> None:
        self._path = path
        self._stop = stop
        self.offset = offset

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the rows that are complete by now, each with its offset, and move on behind it."""
        with self._path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                here = self.offset
                if not line.endswith(b"\n") or (self._stop is not None and here >= self._stop):
                    return
                self.offset += len(line)
                row = _parsed(line)
                if row is not None:
                    yield here, row


class Marks:
    """The last step of every metric. A resumed run trains some steps once more: their metrics
    are in the journal twice, and only the first time is news."""

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}

    def news(self, row: dict[str, Any]) -> dict[str, float]:
        """Return the metrics of a row that are further on than any row before it."""
        step = row["step"]
        fresh = {k: v for k, v in row["metrics"].items() if step > self._steps.get(k, -1)}
        self._steps.update(dict.fromkeys(fresh, step))
        return fresh


class Timeline:
    """Which rows before ``until`` still count: not those of steps that a later start or rewind
    went back behind. A row counts if no turn after it went back to an earlier step."""

    def __init__(self, journal: Path, until: int | None = None) -> None:
        turns = list(turns_of(journal, until))
        self._offsets = [offset for offset, _ in turns]
        self._steps: list[int] = []
        lowest = 1 << 62
        for _, row in reversed(turns):
            lowest = min(lowest, int(row["step"]))
            self._steps.insert(0, lowest)

    def counts(self, offset: int, step: int) -> bool:
        """Tell whether a row at ``offset`` of ``step`` is still part of the run."""
        place = bisect.bisect_right(self._offsets, offset)
        return place == len(self._steps) or step <= self._steps[place]


def turns_of(journal: Path, until: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the ``start`` and ``rewind`` rows with their offsets, up to the one at ``until``."""
    offset = 0
    with journal.open("rb") as file:
        for line in file:
            if until is not None and offset > until:
                return
            if line.startswith(_TURNS) and line.endswith(b"\n"):
                row = _parsed(line)
                if row is not None:
                    yield offset, row
            offset += len(line)


def is_open(journal: Path) -> bool:
    """Tell whether a live process is writing the journal."""
    with journal.open("rb") as file:
        try:
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
