"""The facts of a run that the commands show: settings, state, rows of metrics."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import attrs

from fundamentallm import Period, Progress
from fundamentallm import folder as run_folder
from fundamentallm_runs.metrics_file import Columns, gathered

MAXIMA = ("accuracy", "tokens_per_second", "samples_per_second", "mfu")
"""Metrics (the part after the slash) whose best value is the highest."""


@attrs.frozen
class Record:
    """What the folder of a run says; the run may still be going on, or have been killed."""

    folder: Path
    settings: dict[str, Any]
    environment: dict[str, Any]
    columns: Columns
    state: run_folder.State = "killed"
    ending: run_folder.Ending | None = None
    saved_step: int = 0
    """The step of the newest checkpoint."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return named(self.folder).name

    @property
    def started(self) -> float:
        """Unix time of the last start, in seconds; 0 if it is not recorded."""
        found = self.environment.get("started")
        return float(found) if isinstance(found, float | int) else 0.0

    @property
    def error(self) -> str | None:
        """The error of a failed run."""
        return self.ending.error if self.ending is not None and self.state == "failed" else None

    @property
    def begun(self) -> bool:
        """Whether the run came to its first step, as far as is recorded."""
        return self.ending is None or self.ending.begun

    @property
    def share(self) -> float | None:
        """The completed fraction of the run's length; None if it is unknown."""
        if self.state == "finished":
            return 1.0
        try:
            length = Period.parse(self.settings["run"]["length"])
        except (LookupError, TypeError, ValueError):  # not the settings of a run
            return None
        if length.unit not in ("steps", "tokens") or (length.unit == "tokens" and self.lacks_rows):
            return None
        tokens = self.columns.tokens[-1] if self.columns.tokens else 0
        return min(1.0, length.done(Progress(step=self.step, tokens=tokens)))

    @property
    def step(self) -> int:
        """The last completed step that is recorded: by the end, a row or a checkpoint."""
        if self.ending is not None and self.state != "running":
            return self.ending.step
        return max(self.last_row, self.saved_step)

    @property
    def last_row(self) -> int:
        """The step of the last row; 0 before there is one."""
        return self.columns.steps[-1] if self.columns.steps else 0

    @property
    def written(self) -> float | None:
        """Unix time of the last row, in seconds."""
        return self.columns.times[-1] if self.columns.times else None

    @property
    def lacks_rows(self) -> str | None:
        """Why there are no rows of metrics; None if there are."""
        if self.columns.steps:
            return None
        listed = self.settings.get("plugins")
        names = (
            [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
        )
        tables = [self.settings.get(name) for name in names]
        plugins = [table.get("plugin") for table in tables if isinstance(table, dict)]
        if "jsonl" not in (*names, *plugins):
            return "no rows: jsonl is not listed"
        return "no rows yet" if self.state == "running" else "no rows"

    def last(self, metric: str) -> float | None:
        """Return the latest value of a metric."""
        ends = [(places[-1], values[-1]) for places, values in self.columns.parts(metric)]
        return max(ends)[1] if ends else None

    def best(self, metric: str) -> tuple[int, float] | None:
        """Return the step and the value of the best finite value of a metric: the lowest one, or
        the highest of those in ``MAXIMA``."""
        best = max if metric.rpartition("/")[2] in MAXIMA else min
        found: list[tuple[int, float]] = []
        for places, values in self.columns.parts(metric):
            # If the sum is finite, all values are: quicker than one test per value.
            finite = math.isfinite(sum(values))
            known = values if finite else [value for value in values if math.isfinite(value)]
            if known:
                value = best(known)
                found.append((places[values.index(value)], value))
        if not found:
            return None
        value = best(value for _, value in found)
        return self.columns.steps[min(place for place, one in found if one == value)], value


def named(path: Path) -> Path:
    """Return the path of a folder that ends in its name, as ``.`` and ``..`` do not."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - a link keeps its own name


def read(path: Path) -> Record:
    """Read a run folder; raise a ``FundamentalError`` if it is none, or cannot be read."""
    settings = run_folder.settings(path)
    state = run_folder.state(
        path
    )  # before the rows: a run that ends meanwhile has written them all
    saved = run_folder.checkpoints(path)
    return Record(
        path,
        settings,
        run_folder.environment(path),
        gathered(path / run_folder.METRICS),
        state,
        run_folder.ending(path),
        saved[-1].step if saved else 0,
    )
