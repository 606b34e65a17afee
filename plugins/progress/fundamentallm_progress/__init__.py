"""How far the run is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Protocol

from fundamentallm import field, hookimpl, plugin

if TYPE_CHECKING:
    from fundamentallm import Run


class Display(Protocol):
    """Where progress is shown."""

    def start_training(self) -> None:
        """Show the steps from now on."""

    def show_metrics(self, metrics: dict[str, float]) -> None:
        """Show the metrics of a log step."""

    def show_task(self, task: str, done: int, total: int | None) -> None:
        """Show how far something long is; it is over when ``done == total``."""

    def close(self) -> None:
        """Show nothing more, and leave everything as it was."""


@plugin
class Progress:
    """Show step, metrics, speed and time left: as a bar, or as lines without a terminal.

    All of it goes to standard error. The bar looks at the run by itself twice a second; a step
    costs nothing.
    """

    metrics: list[str] = field(factory=lambda: ["train/loss", "val/loss", "optim/lr"])
    """The metrics to show, as they were at the last log step."""
    quiet: bool = False
    """Whether to show nothing at all."""

    _display: Display | None = field(init=False, default=None)

    observer = True

    @hookimpl
    def on_progress(self, run: Run, task: str, done: int, total: int | None) -> None:
        """Show how far a long task is."""
        if not self.quiet and run.rank == 0:
            self._shown(run).show_task(task, done, total)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Show the steps from now on."""
        if not self.quiet and run.rank == 0:
            self._shown(run).start_training()

    @hookimpl
    def on_log(self, metrics: dict[str, float]) -> None:
        """Show the metrics of the row."""
        if self._display is not None:
            self._display.show_metrics(metrics)

    @hookimpl
    def on_train_end(self) -> None:
        """Leave the terminal in order."""
        if self._display is not None:
            self._display.close()
            self._display = None

    def _shown(self, run: Run) -> Display:
        if self._display is None:
            # Long tasks such as tokenizing come before the training starts.
            if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
                from fundamentallm_progress.bar import Bar

                self._display = Bar(run, self.metrics)
            else:
                from fundamentallm_progress.lines import Lines

                self._display = Lines(run, self.metrics)
        return self._display
