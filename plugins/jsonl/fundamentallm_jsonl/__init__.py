"""The metrics of a run as one JSON object per line."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm import field, hookimpl, plugin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fundamentallm import Run

FILE = "metrics.jsonl"
HISTOGRAMS = "histograms.jsonl"
log = logging.getLogger("fundamentallm")


@plugin
class Jsonl:
    """Append every row of metrics to ``metrics.jsonl`` in the run folder, as a line of JSON.

    A line holds ``time`` (Unix, in seconds), ``step``, ``tokens`` (trained on so far) and
    ``metrics`` by name. It is written at once and whole; a run that is resumed or goes back drops
    the lines of steps that it makes again, so that no step is there twice. A run that starts anew
    where rows are already keeps them in a file beside. Histograms that another plugin hands over go
    to ``histograms.jsonl`` in the same way, and how the run ended to ``outcome.json``.
    """

    role = "observer"

    _folder: Path | None = field(init=False, default=None)
    _files: dict[str, int] = field(init=False, factory=dict)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Begin the files, without the rows of steps that are still to come."""
        if run.rank == 0:
            if run.progress.step == 0:
                for path in (run.folder / FILE, run.folder / HISTOGRAMS):
                    set_aside(path)
            self._open(run)

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Drop the rows of the steps that have become void."""
        if self._folder is not None:
            self._close()
            self._open(run)

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """Append a row, in one write."""
        self._append(FILE, row(run.progress.step, run.progress.tokens, metrics))

    @hookimpl
    def on_histogram(
        self, name: str, step: int, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Append a histogram."""
        self._append(HISTOGRAMS, histogram(name, step, edges, counts))

    @hookimpl
    def on_train_end(self) -> None:
        """Close the files."""
        self._close()

    def _open(self, run: Run) -> None:
        # A step that a signal left open is closed, and its row written, by whoever resumes it: a
        # process that was killed after that has left the row already.
        step = run.progress.logged_step
        for path in (run.folder / FILE, run.folder / HISTOGRAMS):
            if path.exists():
                drop_rows_after(step, path)
        self._folder = run.folder
        self._append(FILE, b"")  # it is there from the start

    def _append(self, name: str, line: bytes) -> None:
        if self._folder is None:
            return
        if name not in self._files:
            # Appending, so that one write puts the whole line at the end, whoever else writes.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._files[name] = os.open(self._folder / name, flags, 0o666)
        if os.write(self._files[name], line) < len(line):
            raise OSError(f"{self._folder / name}: the disk took only a part of a line")

    def _close(self) -> None:
        self._folder = None
        while self._files:
            os.close(self._files.popitem()[1])


def row(step: int, tokens: int, metrics: dict[str, float]) -> bytes:
    """Return one line. JSON has no NaN: it is ``"NaN"``, as infinity is ``"Infinity"`` and
    ``"-Infinity"``; ``float()`` of the string is the number again."""
    values: dict[str, Any] = {name: _value(value) for name, value in metrics.items()}
    facts = {"time": round(time.time(), 3), "step": step, "tokens": tokens, "metrics": values}
    return json.dumps(facts, allow_nan=False).encode() + b"\n"


def histogram(name: str, step: int, edges: Sequence[float], counts: Sequence[int]) -> bytes:
    """Return one line: ``counts[i]`` values lie from ``edges[i]`` up to ``edges[i + 1]``."""
    facts = {"time": round(time.time(), 3), "step": step, "name": name, "edges": edges}
    return json.dumps(facts | {"counts": counts}, allow_nan=False).encode() + b"\n"


def set_aside(path: Path) -> None:
    """Move a file that holds rows to a name of its own: no checkpoint could make them again."""
    if not path.exists():
        return
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
