"""The metrics of a run as one JSON object per line."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from typing import TYPE_CHECKING, Any

from fundamentallm import field, hookimpl, plugin

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm import Run

FILE = "metrics.jsonl"
log = logging.getLogger("fundamentallm")


@plugin
class Jsonl:
    """Append every row of metrics to ``metrics.jsonl`` in the run folder, as a line of JSON.

    A line holds ``time`` (Unix, in seconds), ``step``, ``tokens`` (trained on so far) and
    ``metrics`` by name. It is written at once and whole; a run that is resumed or goes back drops
    the lines of steps that it makes again, so that no step is there twice. A run that starts anew
    where rows are already keeps them in a file beside.
    """

    _file: int | None = field(init=False, default=None)

    observer = True

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Open the file, without the rows of steps that are still to come."""
        if run.rank == 0:
            path = run.folder / FILE
            if run.progress.step == 0 and path.exists():
                set_aside(path)
            self._open(run)

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Drop the rows of the steps that have become void."""
        if self._file is not None:
            self.on_train_end()
            self._open(run)

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """Append a row, in one write."""
        if self._file is not None:
            line = row(run.progress.step, run.progress.tokens, metrics)
            if os.write(self._file, line) < len(line):
                raise OSError(f"{run.folder / FILE}: the disk took only a part of a line")

    @hookimpl
    def on_train_end(self) -> None:
        """Close the file."""
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)

    def _open(self, run: Run) -> None:
        path = run.folder / FILE
        if path.exists():
            # A step that a signal left open is closed, and its row written, by whoever resumes it:
            # a process that was killed after that has left the row already.
            drop_rows_after(run.progress.step - (not run.progress.closed), path)
        # Appending, so that one write puts the whole line at the end, whoever else writes.
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)


def row(step: int, tokens: int, metrics: dict[str, float]) -> bytes:
    """Return one line. JSON has no NaN: it is ``"NaN"``, as infinity is ``"Infinity"`` and
    ``"-Infinity"``; ``float()`` of the string is the number again."""
    values: dict[str, Any] = {name: _value(value) for name, value in metrics.items()}
    facts = {"time": round(time.time(), 3), "step": step, "tokens": tokens, "metrics": values}
    return json.dumps(facts, allow_nan=False).encode() + b"\n"


def set_aside(path: Path) -> None:
    """Move a file that holds rows to a name of its own: no checkpoint could make them again."""
    with path.open("rb") as old:
        if not any(_belongs(line, math.inf) for line in old):
            return
    when = int(time.time())
    while (aside := path.with_name(f"{path.name}.before-{when}")).exists():
        when += 1
    path.rename(aside)
    log.warning("the run starts at step 0: the rows that %s held are now in %s", path, aside.name)


def drop_rows_after(step: int, path: Path) -> None:
    """Drop rows of later steps and what is no row, such as a line that was cut short."""
    # Always the same name: what a killed process left is written over, not left for ever.
    beside = path.with_name(f".{path.name}.new")
    changed = False
    try:
        with path.open("rb") as old, beside.open("wb") as new:
            for line in old:
                whole = line.removesuffix(b"\n") + b"\n" if _belongs(line, step) else b""
                new.write(whole)
                changed |= whole != line
            new.flush()
            os.fsync(new.fileno())
        if changed:
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _belongs(line: bytes, step: float) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return False


def _value(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
