"""A CSV file of a header and one line per row, which survives kills and unknown content."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from fundamentallm import durable_file, set_aside

FACTS = ("time", "step", "tokens")
"""The columns before the metrics."""
log = logging.getLogger("fundamentallm")


class Table:
    """The table in the file at ``path``. Opening it drops the rows of steps after ``step``."""

    def __init__(self, path: Path, step: float) -> None:
        self.path = path
        self.names: list[str] = []
        self._file = -1
        self.reopen(step)

    def reopen(self, step: float) -> None:
        """Drop the rows of later steps and incomplete lines; rename a file that is no table."""
        self.close()
        if self.path.exists():
            with reading(self.path) as file:
                foreign = header(file) is None
            if foreign:
                rename_old(self.path)
        self._open()
        self._rewrite(step)

    def append(self, facts: list[str], metrics: dict[str, float]) -> None:
        """Append a row; add a column for each new metric.

        Raises ``OSError`` if the disk does not take the whole line.
        """
        new = [name for name in metrics if name not in self.names]
        if new:
            self._rewrite(math.inf, new)
        # A single write, so that a killed process leaves the whole line or nothing of it.
        cells = [number(metrics[name]) if name in metrics else "" for name in self.names]
        line = ",".join([*facts, *cells]).encode() + b"\n"
        if os.write(self._file, line) < len(line):
            raise OSError(f"{self.path}: only a part of the line was written; is the disk full?")

    def close(self) -> None:
        """Close the file. Every row has been written already."""
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self.path, flags, 0o666)

    def _rewrite(self, step: float, new: Iterable[str] = ()) -> None:
        """Drop the rows after ``step`` and add the ``new`` columns, if that changes the table."""
        with self.path.open("rb") as old:
            parts = self._content(step, new)
            if all(old.read(len(part)) == part for part in parts) and not old.read(1):
                return
        with durable_file(self.path) as file:
            file.writelines(self._content(step, new))
        # The old descriptor would append to the deleted file.
        self.close()
        self._open()

    def _content(self, step: float, new: Iterable[str]) -> Iterator[bytes]:
        with reading(self.path) as old:
            found = header(old) or []
            self.names = [*found, *new]
            padding = "," * (len(self.names) - len(found))
            yield line_of([*FACTS, *self.names]) if self.names else b""
            for row in rows(old, len(FACTS) + len(found), step):
                yield f"{row}{padding}\n".encode()


def reading(path: Path) -> TextIO:
    """Open a table for reading, with its line ends; replace bytes that are not UTF-8."""
    return path.open(newline="", encoding="utf-8", errors="replace")


def header(file: Iterator[str]) -> list[str] | None:
    """Return the names of the metrics from the first line; None if it is not our header."""
    try:
        found = next(csv.reader(whole(file)), [*FACTS])
    except csv.Error:
        return None
    return found[len(FACTS) :] if tuple(found[: len(FACTS)]) == FACTS else None


def rows(file: Iterator[str], width: int, step: float) -> Iterator[str]:
    """Yield the rows of steps up to ``step`` without line ends; skip what is not a row."""
    for line in whole(file):
        row = line.rstrip("\r\n")
        if belongs(row.split(","), width, step):
            yield row


def whole(file: Iterator[str]) -> Iterator[str]:
    """Yield the lines that have a line end. A killed process leaves the last one without."""
    return (line for line in file if line.endswith(("\n", "\r")))


def belongs(cells: list[str], width: int, step: float) -> bool:
    """Return whether these are the cells of a row whose step is at most ``step``."""
    try:
        numbers = [float(cell or "nan") for cell in cells]
        return len(numbers) == width and int(cells[1]) <= step
    except (ValueError, IndexError):
        return False


def move_old(path: Path) -> None:
    """Rename a table that has rows: they cannot be repeated without their checkpoints."""
    if path.is_file():
        with reading(path) as old:
            names = header(old)
            has_rows = names is not None and any(rows(old, len(FACTS) + len(names), math.inf))
        if has_rows:
            rename_old(path)


def rename_old(path: Path) -> None:
    """Set a file aside, and warn."""
    renamed = set_aside(path, path.suffix)
    log.warning("%s existed already; it was renamed to %s", path, renamed.name)


def line_of(cells: list[str]) -> bytes:
    """Return one line; cells that contain a comma, a quote or a line end are quoted."""
    text = io.StringIO()
    csv.writer(text).writerow(cells)  # with its default line end, whose characters it quotes
    return text.getvalue().removesuffix("\r\n").encode() + b"\n"


def number(value: float) -> str:
    """Return a number as text that ``float()`` reads exactly; ``NaN``, ``Infinity`` in words."""
    value = float(value)
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
