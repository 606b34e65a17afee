"""Write the metrics of a run as one JSON object per line."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm import durable_file, field, hookimpl, plugin, set_aside

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fundamentallm import Run

FILE = "metrics.jsonl"
HISTOGRAMS = "histograms.jsonl"
log = logging.getLogger("fundamentallm")


@plugin
class Jsonl:
    """Append every row of metrics to ``metrics.jsonl`` in the run folder, as a line of JSON.

    A line has ``time`` (Unix, in seconds), ``step``, ``tokens`` (trained on so far) and
    ``metrics`` by name, and is a single write. A run that is resumed or rewound drops the lines of
    the steps that it repeats, so that no step is there twice. A run that starts at step 0 renames
    an existing file with rows. Histograms of other plugins go to ``histograms.jsonl`` in the same
    way.
    """

    role = "observer"

    _folder: Path | None = field(init=False, default=None)
    _files: dict[str, int] = field(init=False, factory=dict)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Open the files, and drop the rows of later steps."""
        if run.rank == 0:
            if run.progress.step == 0:
                for path in (run.folder / FILE, run.folder / HISTOGRAMS):
                    move_old(path)
            self._open(run)

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Drop the rows of the steps after the checkpoint."""
        if self._folder is not None:
            self._close()
            self._open(run)

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """Append a row to `metrics.jsonl` in one write."""
        self._append(FILE, row(run.progress.step, run.progress.tokens, metrics))

    @hookimpl
    def on_histogram(
        self, name: str, step: int, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Append a histogram to `histograms.jsonl`."""
        self._append(HISTOGRAMS, histogram(name, step, edges, counts))

    @hookimpl
    def on_train_end(self) -> None:
        """Close `metrics.jsonl` and `histograms.jsonl`."""
        self._close()

    def _open(self, run: Run) -> None:
        # A signal may have prevented the row of the last step. The resumed run logs it first; if
        # an earlier process did so and was killed, its row is dropped here.
        step = run.progress.logged_step
        for path in (run.folder / FILE, run.folder / HISTOGRAMS):
            if path.exists():
                drop_rows_after(step, path)
        self._folder = run.folder
        self._append(FILE, b"")  # readers find the file before the first row

    def _append(self, name: str, line: bytes) -> None:
        if self._folder is None:
            return
        if name not in self._files:
            # O_APPEND puts the whole line at the end, even if another process writes, too.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._files[name] = os.open(self._folder / name, flags, 0o666)
        if os.write(self._files[name], line) < len(line):
            where = self._folder / name
            raise OSError(f"{where}: only a part of the line was written; is the disk full?")

    def _close(self) -> None:
        self._folder = None
        while self._files:
            os.close(self._files.popitem()[1])


def row(step: int, tokens: int, metrics: dict[str, float]) -> bytes:
    """Return a row of metrics as one line.

    JSON has no NaN and no infinity: they become the strings ``"NaN"``, ``"Infinity"`` and
    ``"-Infinity"``, which ``float()`` reads.
    """
    values: dict[str, Any] = {name: _value(value) for name, value in metrics.items()}
    facts = {"time": round(time.time(), 3), "step": step, "tokens": tokens, "metrics": values}
    return json.dumps(facts, allow_nan=False).encode() + b"\n"


def histogram(name: str, step: int, edges: Sequence[float], counts: Sequence[int]) -> bytes:
    """Return a histogram as one line; ``counts[i]`` counts the values from ``edges[i]`` on."""
    facts = {"time": round(time.time(), 3), "step": step, "name": name, "edges": edges}
    return json.dumps(facts | {"counts": counts}, allow_nan=False).encode() + b"\n"


def move_old(path: Path) -> None:
    """Rename a file that has rows: they cannot be repeated without their checkpoints."""
    if not path.exists():
        return
    with path.open("rb") as old:
        if not any(_belongs(line, math.inf) for line in old):
            return
    renamed = set_aside(path)
    log.warning("the run starts at step 0: the rows that %s held are now in %s", path, renamed.name)


def drop_rows_after(step: int, path: Path) -> None:
    """Drop the rows of later steps and lines that are not rows, such as incomplete ones."""
    with path.open("rb") as old:
        if all(_kept(line, step) == line for line in old):
            return
    with path.open("rb") as old, durable_file(path) as new:
        new.writelines(_kept(line, step) for line in old)


def _kept(line: bytes, step: float) -> bytes:
    return line.removesuffix(b"\n") + b"\n" if _belongs(line, step) else b""


def _belongs(line: bytes, step: float) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return False


def _value(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
