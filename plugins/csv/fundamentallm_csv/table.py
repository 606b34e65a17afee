"""A table in a file: a header of column names, then numbers, one row to a line."""

from __future__ import annotations

import csv
import filecmp
import io
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

FACTS = ("time", "step", "tokens")
"""The columns before the metrics."""
log = logging.getLogger("fundamentallm")


class Table:
    """The table in the file at ``path``, without what it holds of steps after ``step``."""

    def __init__(self, path: Path, step: float) -> None:
        self.path = path
        self.names: list[str] = []
        self._file = -1
        self.reopen(step)

    def reopen(self, step: float) -> None:
        """Drop the rows of later steps and what is no row, such as a line that was cut short."""
        self.close()
        if self.path.exists():
            with reading(self.path) as file:
                foreign = header(file) is None
            if foreign:
                set_aside(self.path)
        self._open()
        self._rewrite(step)

    def append(self, facts: list[str], metrics: dict[str, float]) -> None:
        """Add a row at the end; metrics without a column get one."""
        new = [name for name in metrics if name not in self.names]
        if new:
            self._rewrite(math.inf, new)
        # Whole or not at all, unless the disk is full: one write, of digits and commas alone.
        cells = [number(metrics[name]) if name in metrics else "" for name in self.names]
        line = ",".join([*facts, *cells]).encode() + b"\n"
        if os.write(self._file, line) < len(line):
            raise OSError(f"{self.path}: the disk took only a part of a line")

    def close(self) -> None:
        """Close the file; everything is in it already."""
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self.path, flags, 0o666)

    def _rewrite(self, step: float, new: Iterable[str] = ()) -> None:
        """Put a table with rows up to ``step`` and the ``new`` columns in place of the old one."""
        # Always the same name: what a killed process left is written over, not left for ever.
        beside = self.path.with_name(f".{self.path.name}.new")
        try:
            with reading(self.path) as old, beside.open("wb") as file:
                found = header(old) or []
                self.names = [*found, *new]
                padding = "," * (len(self.names) - len(found))
                file.write(line_of([*FACTS, *self.names]) if self.names else b"")
                for row in rows(old, len(FACTS) + len(found), step):
                    file.write(f"{row}{padding}\n".encode())
                file.flush()
                os.fsync(file.fileno())
            if not filecmp.cmp(beside, self.path, shallow=False):
                beside.replace(self.path)
                self.close()
                self._open()
        finally:
            beside.unlink(missing_ok=True)


def reading(path: Path) -> TextIO:
    """Open a table whose lines keep their ends, and in which bytes that are no text stand."""
    return path.open(newline="", encoding="utf-8", errors="replace")


def header(file: Iterator[str]) -> list[str] | None:
    """Read the names of the metrics from a table's first line; None if that is no such line."""
    try:
        found = next(csv.reader(whole(file)), [*FACTS])
    except csv.Error:
        return None
    return found[len(FACTS) :] if tuple(found[: len(FACTS)]) == FACTS else None


def rows(file: Iterator[str], width: int, step: float) -> Iterator[str]:
    """Yield the lines of up to ``step`` without their ends, and only those that are rows."""
    for line in whole(file):
        row = line.rstrip("\r\n")
        if belongs(row.split(","), width, step):
            yield row


def whole(file: Iterator[str]) -> Iterator[str]:
    """Yield the lines that are not cut short."""
    return (line for line in file if line.endswith(("\n", "\r")))


def belongs(cells: list[str], width: int, step: float) -> bool:
    """Tell whether these are the cells of a row of at most ``step``."""
    try:
        numbers = [float(cell or "nan") for cell in cells]
        return len(numbers) == width and int(cells[1]) <= step
    except (ValueError, IndexError):
        return False


def begin_anew(path: Path) -> None:
    """Set a table that holds rows aside: no checkpoint could make them again."""
    if path.is_file():
        with reading(path) as old:
            names = header(old)
            held = names is not None and any(rows(old, len(FACTS) + len(names), math.inf))
        if held:
            set_aside(path)


def set_aside(path: Path) -> None:
    """Move a file to a name of its own."""
    when = int(time.time())
    while (aside := path.with_name(f"{path.stem}.before-{when}{path.suffix}")).exists():
        when += 1
    path.rename(aside)
    log.warning("%s: what it held is now in %s", path, aside.name)


def line_of(cells: list[str]) -> bytes:
    """Return one line; cells that hold a comma, a quote or the end of a line are quoted."""
    text = io.StringIO()
    csv.writer(text).writerow(cells)  # with its own line end, whose parts it knows to quote
    return text.getvalue().removesuffix("\r\n").encode() + b"\n"


def number(value: float) -> str:
    """Write a number so that ``float()`` gives exactly it again: in words where it is none."""
    value = float(value)
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
