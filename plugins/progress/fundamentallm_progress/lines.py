"""Progress as plain lines: one for each row of metrics, and some for long tasks."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from fundamentallm_progress.view import View, count

if TYPE_CHECKING:
    from collections.abc import Callable

    from fundamentallm import Run

_PATIENCE = 10.0
"""Seconds between two lines of one task; shorter tasks have no line."""
_APART = 1.0
"""Smallest number of seconds between two lines of the training."""


class Lines:
    """Prints to standard error."""

    def __init__(
        self, run: Run, metrics: list[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._clock = run, clock
        self._view = View(run, metrics, clock)
        self._next = clock()
        self._last: dict[str, float] = {}
        self._shown: set[str] = set()

    def start_training(self) -> None:
        """Start the progress bar of the training."""
        self._view.start_training()

    def show_metrics(self, metrics: dict[str, float], validated: bool) -> None:
        """Print a line, unless one was just printed; a validation and the end always have one."""
        self._view.keep_metrics(metrics, only=True)
        share, *facts = self._view.facts()
        now = self._clock()
        if validated or self._run.ending or now >= self._next:
            self._next = now + _APART
            self._print("  ".join([f"{count(self._run)} ({share})", *facts]))

    def end_validation(self) -> None:
        """Remove the validation."""
        self._view.end_validation()

    def show_task(self, task: str, done: int, total: int | None) -> None:
        """Show the progress of a long task; ``done == total`` ends it."""
        self._view.follow(task, done, total)
        now = self._clock()
        long = now - self._last.setdefault(task, now) > _PATIENCE
        if long or (done == total and task in self._shown):
            self._last[task] = now
            self._shown.add(task)
            self._print(f"{task}: {done / total:.0%}" if total else f"{task}: {done:,}")
        if done == total:
            del self._last[task]
            self._shown.discard(task)

    def close(self) -> None:
        """Do nothing: lines need no end."""

    def _print(self, text: str) -> None:
        # Flushed, so that the log file of a batch system shows it during the run.
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
