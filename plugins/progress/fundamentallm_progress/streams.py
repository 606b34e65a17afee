"""Streams in front of a terminal: one for the bar, and one for the output of other code."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# Synchronized output: a terminal shows the text between them at once, or ignores them.
BEGIN, END = "\x1b[?2026h", "\x1b[?2026l"


class StreamProxy:
    """A stream around another one, with all of its other attributes."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class SynchronizedStream(StreamProxy):
    """Writes every text as one synchronized update, so that the terminal shows no half of it."""

    def write(self, text: str) -> int:
        """Write text."""
        if text:
            self.stream.write(f"{BEGIN}{text}{END}")
        return len(text)


class StreamAboveBar(StreamProxy):
    """Writes whole lines above the bar, unchanged; an incomplete line waits for its end."""

    def __init__(self, stream: TextIO, console: Console) -> None:
        super().__init__(stream)
        self._console = console
        self._rest = ""
        self._lock = threading.RLock()  # a signal handler may log in the middle of a line
        self._open = True

    def write(self, text: str) -> int:
        """Write text."""
        if not self._open:
            return self.stream.write(text)
        with self._lock:
            whole, newline, rest = (self._rest + text).rpartition("\n")
            self._rest = _last(rest)
        if newline:
            lines = "\n".join(_last(line.rstrip("\r")) for line in whole.split("\n"))
            self._console.out(lines, highlight=False)
        return len(text)

    def flush(self) -> None:
        """Do nothing: whole lines are written at once."""

    def end(self) -> None:
        """Write the incomplete line; from now on write to the stream itself."""
        self._open = False
        if self._rest:
            self.stream.write(self._rest)
            self._rest = ""


def _last(line: str) -> str:
    """Return the last text of a line that carriage returns overwrite."""
    return line[line.rstrip("\r").rfind("\r") + 1 :]
