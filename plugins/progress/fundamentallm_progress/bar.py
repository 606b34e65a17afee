"""Progress as a bar at the bottom of a terminal, with a line for each long task under way."""

from __future__ import annotations

import atexit
import logging
import sys
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fundamentallm_progress.pace import Pace, label, steps

if TYPE_CHECKING:
    from fundamentallm import Run

_WIDTH = 24
_PER_SECOND = 2


class Bar:
    """Draws itself twice a second from a thread of its own, by what the run says then.

    What others print or log meanwhile appears above it.
    """

    def __init__(self, run: Run, metrics: list[str]) -> None:
        self._run = run
        self._names = metrics
        self._console = Console(stderr=True)
        self._pace: Pace | None = None
        self._metrics: dict[str, float] = {}
        self._tasks: dict[str, tuple[int, int | None]] = {}
        self._live: Live | None = None
        self._moved: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []

    def start_training(self) -> None:
        """Show the steps from now on."""
        self._pace = Pace(self._run)
        self._open()

    def show_metrics(self, metrics: dict[str, float]) -> None:
        """Show the metrics of a log step."""
        # A metric of a validation stays until the next one.
        known = self._metrics | metrics
        self._metrics = {name: known[name] for name in self._names if name in known}

    def show_task(self, task: str, done: int, total: int | None) -> None:
        """Show how far something long is; it is over when ``done == total``."""
        self._tasks[task] = (done, total)
        self._open()
        if done != total:
            return
        if self._pace is None and len(self._tasks) == 1:
            self.close()  # perhaps no training follows: a run may be loaded for something else
        del self._tasks[task]

    def close(self) -> None:
        """Leave the terminal as it was, with the last state of the bar on it."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            for handler, stream in self._moved:
                handler.setStream(stream)
            self._moved = []
            atexit.unregister(self.close)

    def _open(self) -> None:
        if self._live is not None:
            return
        before = sys.stderr
        self._live = Live(
            get_renderable=self._draw, console=self._console, refresh_per_second=_PER_SECOND,
            redirect_stdout=sys.stdout.isatty(),
        )  # fmt: skip
        self._live.start()
        atexit.register(self.close)  # a hidden cursor would outlive a process that ends abruptly
        # Handlers hold the stream that they were made with, and would write across the bar.
        for logger in (logging.getLogger(), logging.getLogger("fundamentallm")):
            for handler in logger.handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                    handler.setStream(sys.stderr)
                    self._moved.append((handler, before))

    def _draw(self) -> Group:
        table = Table.grid(padding=(0, 1))
        for task, (done, total) in list(self._tasks.items()):
            count = f"{done / total:.0%}" if total else f"{done:,}"
            bar = ProgressBar(total, done, width=_WIDTH, pulse=total is None)
            table.add_row(Text(task), bar, count)
        return Group(table, *([self._training(self._pace)] if self._pace is not None else []))

    def _training(self, pace: Pace) -> Table:
        pace.look()
        left = pace.left()
        facts = [f"{label(name)} {value:.4g}" for name, value in self._metrics.items()]
        facts += [pace.speed(), f"{left} left" if left else ""]
        bar = ProgressBar(1.0, pace.share, width=_WIDTH)
        table = Table.grid(padding=(0, 1))
        count = steps(self._run)
        table.add_column(no_wrap=True, min_width=len(count))
        table.add_column(min_width=_WIDTH // 2)
        # What a narrow terminal cannot hold is cut off here.
        table.add_column(no_wrap=True, overflow="ellipsis")
        table.add_row(count, bar, Text("  ".join([f"{pace.share:.0%}", *filter(None, facts)])))
        return table
