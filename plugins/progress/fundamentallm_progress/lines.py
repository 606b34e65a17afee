"""Progress as plain lines: of log steps, and now and then one of a long task."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from fundamentallm_progress.view import View, count

if TYPE_CHECKING:
    from collections.abc import Callable

    from fundamentallm import Run

_PATIENCE = 10.0
"""Seconds between two lines of one task; shorter tasks are not worth a line."""
_APART = 1.0
"""Seconds from one line of the training to the next, at least."""


class Lines:
    """Prints to standard error."""

    def __init__(
        self, run: Run, metrics: list[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._clock = run, clock
        self._view = View(run, metrics, clock)
        self._next = clock()
        self._validated = False
        self._last: dict[str, float] = {}
        self._told: set[str] = set()

    def start_training(self) -> None:
        """Show the steps from now on."""
        self._view.start_training()

    def show_metrics(self, metrics: dict[str, float]) -> None:
        """Print a line, unless one was just printed; a validation and the end always have one."""
        self._view.keep_metrics(metrics, only=True)
        share, *facts = self._view.facts()
        kept, self._validated = self._validated or self._run.ending, False
        now = self._clock()
        if kept or now >= self._next:
            self._next = now + _APART
            self._print("  ".join([f"{count(self._run)} ({share})", *facts]))

    def end_validation(self) -> None:
        """Let the next row have its line in any case."""
        self._view.end_validation()
        self._validated = True

    def show_task(self, task: str, done: int, total: int | None) -> None:
        """Show how far something long is; it is over when ``done == total``."""
        self._view.follow(task, done, total)
        now = self._clock()
        long = now - self._last.setdefault(task, now) > _PATIENCE
        if long or (done == total and task in self._told):
            self._last[task] = now
            self._told.add(task)
            self._print(f"{task}: {done / total:.0%}" if total else f"{task}: {done:,}")
        if done == total:
            del self._last[task]
            self._told.discard(task)

    def close(self) -> None:
        """Nothing is open."""

    def _print(self, text: str) -> None:
        # Flushed: in a batch system's log file a line is of use while the run lasts.
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
