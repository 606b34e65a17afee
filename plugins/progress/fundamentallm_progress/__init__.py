"""Show progress: a bar on a terminal or in a notebook, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Protocol

from fundamentallm import field, hookimpl, plugin

if TYPE_CHECKING:
    from fundamentallm import Run


class Display(Protocol):
    """Where progress is shown."""

    # Each display has these methods itself: what it does around the view differs in most of them.

    def start_training(self) -> None:
        """Start the progress bar of the training."""

    def show_metrics(self, metrics: dict[str, float], validated: bool) -> None:
        """Show the metrics of a row; ``validated`` if they contain those of a validation."""

    def end_validation(self) -> None:
        """Remove the validation; its metrics follow with the next row."""

    def show_task(self, task: str, done: int, total: int | None) -> None:
        """Show the progress of a long task; ``done == total`` ends it."""

    def close(self) -> None:
        """Stop, and restore the streams."""


@plugin
class Progress:
    """Show step, metrics, speed and time left: as a bar, or as lines without a terminal.

    It writes to standard error. A thread redraws the bar twice a second; a step costs nothing.
    """

    role = "observer"

    metrics: list[str] = field(factory=lambda: ["train/loss", "val/loss", "optim/lr"])
    """Names of the metrics to show, with the values of the last row."""
    quiet: bool = False
    """Show nothing."""

    _display: Display | None = field(init=False, default=None)

    @hookimpl
    def on_progress(self, run: Run, task: str, done: int, total: int | None) -> None:
        """Show the progress of a long task."""
        if not self.quiet and run.rank == 0:
            self._shown(run).show_task(task, done, total)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Start the progress bar of the training."""
        if not self.quiet and run.rank == 0:
            self._shown(run).start_training()

    @hookimpl
    def on_validation_end(self) -> None:
        """Remove the bar of the validation."""
        if self._display is not None:
            self._display.end_validation()

    @hookimpl
    def on_log(self, metrics: dict[str, float], validated: bool) -> None:
        """Show the metrics of the row."""
        if self._display is not None:
            self._display.show_metrics(metrics, validated)

    @hookimpl
    def on_train_end(self) -> None:
        """Restore the terminal."""
        if self._display is not None:
            self._display.close()
            self._display = None

    def _shown(self, run: Run) -> Display:
        if self._display is None:
            # Long tasks such as tokenizing come before the training starts.
            self._display = self._suited(run)
        return self._display

    def _suited(self, run: Run) -> Display:
        ipython = sys.modules.get("IPython")
        if ipython is not None and hasattr(ipython.get_ipython(), "kernel"):
            from fundamentallm_progress.notebook import Notebook

            return Notebook(run, self.metrics)
        # The log of a CI service would contain every redraw of a bar.
        drawable = os.environ.get("TERM") not in ("dumb", "unknown") and not os.environ.get("CI")
        if sys.stderr.isatty() and drawable:
            from fundamentallm_progress.bar import Bar

            return Bar(run, self.metrics)
        from fundamentallm_progress.lines import Lines

        return Lines(run, self.metrics)
