"""What a run folder tells of its run."""

from __future__ import annotations

import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any, Literal, TypeAlias

import attrs
import tomli

from fundamentallm import Period, Progress, SettingsError, StorageError
from fundamentallm_runs.rows import Columns, gathered

State: TypeAlias = Literal["running", "finished", "stopped", "interrupted", "failed", "cut"]
OUTCOMES = ("finished", "stopped", "interrupted", "failed")
MAXIMA = ("accuracy", "tokens_per_second", "samples_per_second", "mfu")


@attrs.frozen
class Record:
    """A run as its folder tells it; it may still be going on, or have been cut short."""

    folder: Path
    settings: dict[str, Any]
    environment: dict[str, Any]
    columns: Columns
    state: State = "cut"
    error: str | None = None
    """What a failed run ended with."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return named(self.folder).name

    @property
    def started(self) -> float:
        """When the run was started last, in Unix seconds; 0 if its folder does not tell."""
        found = self.environment.get("started")
        return float(found) if isinstance(found, float | int) else 0.0

    @property
    def share(self) -> float | None:
        """How much of its length the run has behind it, up to 1; None if that cannot be told."""
        if self.state == "finished":
            return 1.0
        try:
            length = Period.parse(self.settings["run"]["length"])
        except (LookupError, TypeError, ValueError):  # settings of something else
            return None
        if length.unit not in ("steps", "tokens"):
            return None
        tokens = self.columns.tokens[-1] if self.columns.tokens else 0
        return min(1.0, length.done(Progress(step=self.step, tokens=tokens)))

    @property
    def step(self) -> int:
        """The step of the last row; 0 before there is one."""
        return self.columns.steps[-1] if self.columns.steps else 0

    @property
    def written(self) -> float | None:
        """When the last row was written, in Unix seconds."""
        return self.columns.times[-1] if self.columns.times else None

    def last(self, metric: str) -> float | None:
        """Return the latest value of a metric."""
        ends = [(places[-1], values[-1]) for places, values in self.columns.parts(metric)]
        return max(ends)[1] if ends else None

    def best(self, metric: str) -> tuple[int, float] | None:
        """Return the step and the value of a metric's best: the lowest, or of those that grow as
        they get better the highest. What is not finite is never the best."""
        best = max if metric.rpartition("/")[2] in MAXIMA else min
        found: list[tuple[int, float]] = []
        for places, values in self.columns.parts(metric):
            # All are, if their sum is: which is quicker to tell.
            finite = math.isfinite(sum(values))
            known = values if finite else [value for value in values if math.isfinite(value)]
            if known:
                value = best(known)
                found.append((places[values.index(value)], value))
        if not found:
            return None
        value = best(value for _, value in found)
        return self.columns.steps[min(place for place, one in found if one == value)], value


def named(folder: Path) -> Path:
    """Return the path of a folder that ends in its name, as ``.`` and ``..`` do not."""
    return Path(os.path.abspath(folder))  # noqa: PTH100 - a link keeps the name that it has


def is_run(folder: Path) -> bool:
    """Whether a folder is one of a run."""
    return (folder / "settings.toml").is_file()


def read(folder: Path) -> Record:
    """Read a run folder; raise a ``FundamentalError`` if it is none, or cannot be read."""
    if not is_run(folder):
        raise SettingsError(f"{folder}: is not a run folder: it has no settings.toml")
    try:
        settings = tomli.loads((folder / "settings.toml").read_text("utf-8"))
        runs_on = is_running(folder)  # before reading: a run that ends meanwhile has said how
        columns = gathered(folder / "metrics.jsonl")
        record = Record(folder, settings, _kept(folder / "environment.json"), columns)
        if runs_on:
            return attrs.evolve(record, state="running")
        ending = _kept(folder / "outcome.json")
        if ending.get("outcome") not in OUTCOMES:
            return attrs.evolve(record, state=_guessed(record))
        error = str(ending["error"]) if ending.get("error") else None
        return attrs.evolve(record, state=ending["outcome"], error=error)
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        raise StorageError(f"{folder}: cannot be read: {error}") from error


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


def _kept(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _guessed(record: Record) -> State:
    """Tell from the rows how a run ended that has not said so."""
    if record.share is not None and record.share >= 1:
        return "finished"
    crash = record.folder / "crash" / "crash.json"
    is_last = crash.exists() and crash.stat().st_mtime >= (record.written or 0.0)
    return "failed" if is_last else "cut"
