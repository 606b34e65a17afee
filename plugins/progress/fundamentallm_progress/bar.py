"""Progress as a bar at the bottom of a terminal, with a row for each long task under way."""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
from typing import TYPE_CHECKING, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fundamentallm_progress.looks import Looks
from fundamentallm_progress.streams import Above, Steady
from fundamentallm_progress.view import View

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import ConsoleOptions

    from fundamentallm import Run
    from fundamentallm_progress.view import Row

SECONDS = 0.5
# What is typed is echoed behind the bar: ^C has room there, and does not break the row.
_MARGIN = 3


class Bar:
    """Draws itself twice a second from a thread of its own, by what the run says then.

    It draws only what has changed. What others print or log meanwhile appears above it.
    """

    def __init__(self, run: Run, metrics: list[str]) -> None:
        self._view = View(run, metrics)
        self._live: Live | None = None
        self._looks: Looks | None = None
        self._drawn: object = None
        self._streams: list[tuple[str, TextIO, Above]] = []
        self._moved: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []

    def start_training(self) -> None:
        """Show the steps from now on."""
        self._view.start_training()
        self._open()

    def show_metrics(self, metrics: dict[str, float]) -> None:
        """Show the metrics of a log step."""
        self._check()
        self._view.keep_metrics(metrics)

    def end_validation(self) -> None:
        """Show no validation any more."""
        self._view.end_validation()

    def show_task(self, task: str, done: int, total: int | None) -> None:
        """Show how far something long is; it is over when ``done == total``."""
        self._check()
        self._view.follow(task, done, total)
        if self._view.empty:
            self.close()  # perhaps no training follows: a run may be loaded for something else
        else:
            self._open()

    def close(self) -> None:
        """Leave the terminal as it was, with the last state of the training on it."""
        live, self._live = self._live, None
        if live is None:
            return
        atexit.unregister(self._leave)
        if self._looks is not None:
            self._looks.stop()
        self._view.end_tasks()
        try:
            live.stop()
        finally:
            self._give_back()

    def look(self) -> None:
        """Draw what has changed."""
        live = self._live
        if live is not None:
            before, self._drawn = self._drawn, (self._rows(live.console), live.console.size)
            if self._drawn != before:
                live.refresh()

    def __rich_console__(self, console: Console, _: ConsoleOptions) -> Iterator[Text]:
        """Draw what is to be seen now, also where a line of others moves it down."""
        for row in self._rows(console):
            yield Text.assemble(*row, no_wrap=True)

    def _open(self) -> None:
        if self._live is not None:
            return
        # Whoever made this knows that it is a terminal, and one that can be drawn on.
        console = Console(
            file=cast("TextIO", Steady(sys.stderr)), force_terminal=True, force_interactive=True
        )
        self._live = Live(
            get_renderable=lambda: self,
            console=console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with console:
            self._live.start()
            # Of a process that is killed, nobody would show it again.
            console.show_cursor()
        self._take(console)
        self._looks = Looks(self.look, SECONDS)
        atexit.register(self._leave)

    def _leave(self) -> None:
        """Close where nobody else did: the process ends, and its terminal may be gone already."""
        with contextlib.suppress(OSError, ValueError):
            self.close()

    def _check(self) -> None:
        if self._looks is not None and self._looks.error is not None:
            self._live = None  # the terminal is gone
            self._give_back()
            self._looks.check()

    def _rows(self, console: Console) -> list[Row]:
        line = "#-" if console.options.ascii_only else "━─"
        return self._view.rows(console.size.width - _MARGIN, line)

    def _take(self, console: Console) -> None:
        """Put streams in place that write above the bar."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream.isatty():
                above = Above(stream, console)
                setattr(sys, name, above)
                self._streams.append((name, stream, above))
        # Handlers hold the stream that they were made with, and would write across the bar.
        for handler in _handlers():
            for _, stream, above in self._streams:
                if handler.stream is stream:
                    handler.setStream(cast("TextIO", above))
                    self._moved.append((handler, stream))

    def _give_back(self) -> None:
        for name, stream, above in self._streams:
            if getattr(sys, name) is above:
                setattr(sys, name, stream)
            above.end()
        for handler, stream in self._moved:
            handler.setStream(stream)
        self._streams, self._moved = [], []


def _handlers() -> Iterator[logging.StreamHandler[TextIO]]:
    named = logging.getLogger().manager.loggerDict.values()
    for logger in (logging.getLogger(), *named):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler):
                yield handler
