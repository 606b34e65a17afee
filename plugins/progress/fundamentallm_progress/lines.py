"""Progress as plain lines: one per log step, and now and then one of a long task."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from fundamentallm_progress.pace import Pace, label, steps

if TYPE_CHECKING:
    from fundamentallm import Run

_PATIENCE = 10.0
"""Seconds between two lines of one task; shorter tasks are not worth a line."""


class Lines:
    """Prints to standard error."""

    def __init__(self, run: Run, metrics: list[str]) -> None:
        self._run = run
        self._names = metrics
        self._pace = Pace(run)
        self._told: dict[str, float] = {}

    def start_training(self) -> None:
        """Show the steps from now on."""
        self._pace = Pace(self._run)

    def show_metrics(self, metrics: dict[str, float]) -> None:
        """Show the metrics of a log step."""
        self._pace.look()
        parts = [f"{steps(self._run)} ({self._pace.share:.0%})"]
        shown = [name for name in self._names if name in metrics]
        parts += [f"{label(name)} {metrics[name]:.4g}" for name in shown]
        speed, left = self._pace.speed(), self._pace.left()
        parts += [speed] * bool(speed) + [f"{left} left"] * bool(left)
        self._print("  ".join(parts))

    def show_task(self, task: str, done: int, total: int | None) -> None:
        """Show how far something long is; it is over when ``done == total``."""
        now = time.monotonic()
        if now - self._told.setdefault(task, now) > _PATIENCE:
            self._told[task] = now
            self._print(f"{task}: {done / total:.0%}" if total else f"{task}: {done:,}")
        if done == total:
            del self._told[task]

    def close(self) -> None:
        """Nothing is open."""

    def _print(self, text: str) -> None:
        # Flushed: in a batch system's log file a line is of use while the run lasts.
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
