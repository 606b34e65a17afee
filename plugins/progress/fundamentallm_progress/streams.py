"""Streams in front of a terminal: for the bar, and for all that others write meanwhile."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

# Terminals that know them show what is between them at once; the others ignore them.
BEGIN, END = "\x1b[?2026h", "\x1b[?2026l"


class Front:
    """Stands for a stream; what it does not define is the stream's."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Steady(Front):
    """Hands every write to the terminal as one picture, so that no half of it is to be seen."""

    def write(self, text: str) -> int:
        """Write text."""
        if text:
            self.stream.write(f"{BEGIN}{text}{END}")
        return len(text)


class Above(Front):
    """Writes whole lines above the bar, as they are; the rest of a line waits for its end."""

    def __init__(self, stream: TextIO, console: Console) -> None:
        super().__init__(stream)
        self._console = console
        self._rest = ""
        self._lock = threading.RLock()  # a signal's handler may log in the midst of a line
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
        """Write what is left, and from now on to the stream itself."""
        self._open = False
        if self._rest:
            self.stream.write(self._rest)
            self._rest = ""


def _last(line: str) -> str:
    """Return what a terminal would show last of a line that begins anew again and again."""
    return line[line.rstrip("\r").rfind("\r") + 1 :]
