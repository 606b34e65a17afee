"""Progress in a notebook: one area of text that follows the run."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fundamentallm_progress.looks import Looks
from fundamentallm_progress.view import View

if TYPE_CHECKING:
    from fundamentallm import Run

_SECONDS = 1.0
_COLUMNS = 120


class Notebook:
    """Shows itself once, and then changes what it shows, once a second at most.

    A kernel's clients do so for an output that has a name; nothing is printed.
    """

    def __init__(self, run: Run, metrics: list[str]) -> None:
        self._view = View(run, metrics)
        self._looks: Looks | None = None
        self._area: Any = None
        self._shown = ""

    def start_training(self) -> None:
        """Show the steps from now on."""
        self._view.start_training()
        self._open()

    def show_metrics(self, metrics: dict[str, float]) -> None:
        """Show the metrics of a log step."""
        self._view.keep_metrics(metrics)

    def end_validation(self) -> None:
        """Show no validation any more."""
        self._view.end_validation()

    def show_task(self, task: str, done: int, total: int | None) -> None:
        """Show how far something long is; it is over when ``done == total``."""
        self._view.follow(task, done, total)
        if self._view.empty:
            self.close()
        else:
            self._open()

    def close(self) -> None:
        """Leave the last state of the training to be seen."""
        if self._looks is not None:
            self._looks.stop()
            self._looks.check()
            self._looks = None
            self._view.end_tasks()
            self.look()

    def look(self) -> None:
        """Show what has changed."""
        rows = self._view.rows(_COLUMNS)
        text = "\n".join("".join(part for part, _ in row) for row in rows)
        if text != self._shown:
            self._shown = text
            self._area.update({"text/plain": text}, raw=True)

    def _open(self) -> None:
        if self._area is None:
            show = importlib.import_module("IPython.display").display
            self._area = show({"text/plain": ""}, raw=True, display_id=True)
        if self._looks is None:
            self._looks = Looks(self.look, _SECONDS)
