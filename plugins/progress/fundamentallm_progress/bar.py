"""Progress as a bar at the bottom of a terminal, with a row for each long task."""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
from typing import TYPE_CHECKING, TextIO, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from fundamentallm_progress.refresh_thread import RefreshThread
from fundamentallm_progress.streams import StreamAboveBar, SynchronizedStream
from fundamentallm_progress.view import View

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import ConsoleOptions

    from fundamentallm import Run
    from fundamentallm_progress.view import Row

SECONDS = 0.5
# Columns left free after the bar for the echo of ^C, which would break the row.
_MARGIN = 3


class Bar:
    """A bar that a thread redraws twice a second if the run has changed.

    Output and log lines of other code appear above it.
    """

    def __init__(self, run: Run, metrics: list[str]) -> None:
        self._view = View(run, metrics)
        self._live: Live | None = None
        self._thread: RefreshThread | None = None
        self._drawn: object = None
        self._streams: list[tuple[str, TextIO, StreamAboveBar]] = []
        self._moved: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []

    def start_training(self) -> None:
        """Start the progress bar of the training."""
        self._view.start_training()
        self._open()

    def show_metrics(self, metrics: dict[str, float], validated: bool) -> None:
        """Show the metrics of a row."""
        self._check()
        self._view.keep_metrics(metrics)

    def end_validation(self) -> None:
        """Remove the validation."""
        self._view.end_validation()

    def show_task(self, task: str, done: int, total: int | None) -> None:
        """Show the progress of a long task; ``done == total`` ends it."""
        self._check()
        self._view.follow(task, done, total)
        if self._view.empty:
            self.close()  # a run that is only loaded has no training
        else:
            self._open()

    def close(self) -> None:
        """Restore the terminal; the last state of the training stays visible."""
        live, self._live = self._live, None
        if live is None:
            return
        atexit.unregister(self._leave)
        if self._thread is not None:
            self._thread.stop()
        self._view.end_tasks()
        try:
            live.stop()
        finally:
            self._give_back()

    def refresh(self) -> None:
        """Redraw if something has changed."""
        live = self._live
        if live is not None:
            before, self._drawn = self._drawn, (self._rows(live.console), live.console.size)
            if self._drawn != before:
                live.refresh()

    def __rich_console__(self, console: Console, _: ConsoleOptions) -> Iterator[Text]:
        """Draw the current rows; rich calls this also when other output moves the bar."""
        for row in self._rows(console):
            yield Text.assemble(*row, no_wrap=True)

    def _open(self) -> None:
        if self._live is not None:
            return
        # The plugin has checked that standard error is a terminal that can be drawn on.
        console = Console(
            file=cast("TextIO", SynchronizedStream(sys.stderr)),
            force_terminal=True,
            force_interactive=True,
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
            # A killed process could not show the cursor again.
            console.show_cursor()
        self._take(console)
        self._thread = RefreshThread(self.refresh, SECONDS)
        atexit.register(self._leave)

    def _leave(self) -> None:
        """Close at the end of the process; its terminal may be gone already."""
        with contextlib.suppress(OSError, ValueError):
            self.close()

    def _check(self) -> None:
        if self._thread is not None and self._thread.error is not None:
            self._live = None  # the terminal is gone
            self._give_back()
            self._thread.check()

    def _rows(self, console: Console) -> list[Row]:
        line = "#-" if console.options.ascii_only else "━─"
        return self._view.rows(console.size.width - _MARGIN, line)

    def _take(self, console: Console) -> None:
        """Replace the standard streams by ones that write above the bar."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream.isatty():
                above = StreamAboveBar(stream, console)
                setattr(sys, name, above)
                self._streams.append((name, stream, above))
        # Handlers refer to the stream that they were made with, and would write into the bar.
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
