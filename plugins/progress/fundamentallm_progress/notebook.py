"""Progress in a notebook: one area of text that is updated."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fundamentallm_progress.refresh_thread import RefreshThread
from fundamentallm_progress.view import View

if TYPE_CHECKING:
    from fundamentallm import Run

_SECONDS = 1.0
_COLUMNS = 120


class Notebook:
    """An output that is updated at most once a second.

    The clients of a kernel update outputs that have a display id; nothing is printed.
    """

    def __init__(self, run: Run, metrics: list[str]) -> None:
        self._view = View(run, metrics)
        self._thread: RefreshThread | None = None
        self._area: Any = None
        self._shown = ""

    def start_training(self) -> None:
        """Start the progress bar of the training."""
        self._view.start_training()
        self._open()

    def show_metrics(self, metrics: dict[str, float], validated: bool) -> None:
        """Show the metrics of a row."""
        self._view.keep_metrics(metrics)

    def end_validation(self) -> None:
        """Remove the validation."""
        self._view.end_validation()

    def show_task(self, task: str, done: int, total: int | None) -> None:
        """Show the progress of a long task; ``done == total`` ends it."""
        self._view.follow(task, done, total)
        if self._view.empty:
            self.close()
        else:
            self._open()

    def close(self) -> None:
        """Stop the updates; the last state of the training stays visible."""
        if self._thread is not None:
            self._thread.stop()
            self._thread.check()
            self._thread = None
            self._view.end_tasks()
            self.refresh()

    def refresh(self) -> None:
        """Update the output if the text has changed."""
        rows = self._view.rows(_COLUMNS)
        text = "\n".join("".join(part for part, _ in row) for row in rows)
        if text != self._shown:
            self._shown = text
            self._area.update({"text/plain": text}, raw=True)

    def _open(self) -> None:
        if self._area is None:
            show = importlib.import_module("IPython.display").display
            self._area = show({"text/plain": ""}, raw=True, display_id=True)
        if self._thread is None:
            self._thread = RefreshThread(self.refresh, _SECONDS)
