"""What a run folder tells of its run."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import attrs
import tomli

from fundamentallm import Period, Progress, SettingsError, StorageError

State: TypeAlias = Literal["running", "finished", "failed", "stopped"]
MAXIMA = ("accuracy", "tokens_per_second", "samples_per_second", "mfu")


@attrs.frozen
class Row:
    """A row of metrics, as a logger wrote it."""

    step: int
    tokens: int
    time: float
    """Unix time, in seconds."""
    metrics: dict[str, float]


@attrs.frozen
class Record:
    """A run as its folder tells it; it may still be going on, or have been cut short."""

    folder: Path
    settings: dict[str, Any]
    environment: dict[str, Any]
    rows: list[Row]
    state: State

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def share(self) -> float | None:
        """How much of its length the run has behind it, up to 1; None if that cannot be told."""
        last = self.rows[-1] if self.rows else Row(0, 0, 0.0, {})
        length = Period.parse(self.settings["run"]["length"])
        if length.unit not in ("steps", "tokens"):
            return None
        return min(1.0, length.done(Progress(step=last.step, tokens=last.tokens)))

    def series(self, metric: str) -> list[tuple[Row, float]]:
        """Return the rows that have a metric, each with its value."""
        return [(row, row.metrics[metric]) for row in self.rows if metric in row.metrics]

    def last(self, metric: str) -> float | None:
        """Return the latest value of a metric."""
        has = (row.metrics[metric] for row in reversed(self.rows) if metric in row.metrics)
        return next(has, None)

    def best(self, metric: str) -> tuple[int, float] | None:
        """Return the step and the value of a metric's best: the lowest, or of those that grow as
        they get better the highest. What is not a number is never the best."""
        best = max if metric.rpartition("/")[2] in MAXIMA else min
        known = [(value, row.step) for row, value in self.series(metric) if value == value]  # noqa: PLR0124
        if not known:
            return None
        value = best(value for value, _ in known)
        return next(step for one, step in known if one == value), value


def is_run(folder: Path) -> bool:
    """Whether a folder is one of a run."""
    return (folder / "settings.toml").is_file()


def read(folder: Path) -> Record:
    """Read a run folder; raise a ``FundamentalError`` if it is none, or cannot be read."""
    if not is_run(folder):
        raise SettingsError(f"{folder}: is not a run folder: it has no settings.toml")
    try:
        settings = tomli.loads((folder / "settings.toml").read_text("utf-8"))
        rows = list(read_rows(folder / "metrics.jsonl"))
        record = Record(folder, settings, _environment(folder), rows, "stopped")
        return attrs.evolve(record, state=_state(record))
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        raise StorageError(f"{folder}: cannot be read: {error}") from error


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a metrics file; what is not a whole line is passed over."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            row = parsed(line)
            if row is not None:
                yield row


def parsed(line: bytes) -> Row | None:
    """Return the row of a line, or None if it is not a whole one."""
    try:
        kept = json.loads(line)
        pairs = kept["metrics"].items()
        numbers = {name: float("nan" if value is None else value) for name, value in pairs}
        return Row(int(kept["step"]), int(kept["tokens"]), float(kept["time"]), numbers)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def is_running(folder: Path) -> bool:
    """Whether a live process holds the run; asking leaves no trace."""
    try:
        with (folder / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _environment(folder: Path) -> dict[str, Any]:
    try:
        kept = json.loads((folder / "environment.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _state(record: Record) -> State:
    if is_running(record.folder):
        return "running"
    if record.share is not None and record.share >= 1:
        return "finished"
    crash = record.folder / "crash" / "crash.json"
    written = record.rows[-1].time if record.rows else 0.0
    return "failed" if crash.exists() and crash.stat().st_mtime >= written else "stopped"
