"""The journal between the training process, which only appends, and the process that ships.

One JSON object per line, of three kinds::

    {"kind": "start", "time": ms}                                     a process began to train
    {"kind": "metrics", "time": ms, "step": 50, "metrics": {...}}     a log row
    {"kind": "end", "time": ms, "outcome": "finished", "error": null}

``time`` is in milliseconds since 1970. What is in the store is a function of this file alone.
"""

from __future__ import annotations

import errno
import json
import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Journal:
    """The writing end. A row is one write to the operating system: it survives a ``kill -9``."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # a power cut left half a line: keep it to itself

    def append(self, kind: str, **facts: Any) -> None:
        """Add a row; raises ``OSError`` if the disk does not take it."""
        row = {"kind": kind, "time": time.time_ns() // 1_000_000, **facts}
        line = (json.dumps(row) + "\n").encode()
        if os.write(self._file, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Let go of the file; nothing is left to be written."""
        os.close(self._file)


class JournalReader:
    """The reading end, at ``offset``: up to there it has handed out whole rows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.offset = 0

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that are complete by now, and move on behind each."""
        with self._path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                row = _parsed(line)
                if row is not None:
                    yield row


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


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None  # half a line, from a power cut
    return row if isinstance(row, dict) and "kind" in row else None
