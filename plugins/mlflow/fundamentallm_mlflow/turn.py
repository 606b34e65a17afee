"""One process ships a run folder at a time."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, Self

import psutil  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from pathlib import Path

FILE = ".lock"
TOOK_NO_MORE = 3  # exit code


class Turn:
    """A lock on the folder, with the id of the process that has it.

    Who waits for it asks the holder to make way by SIGUSR1. It does if its training process has
    died: what it has not shipped, the one that waits ships.
    """

    def __init__(self, folder: Path, parent: int) -> None:
        self._folder = folder.resolve()
        self._parent = parent
        self._file = (folder / FILE).open("a+")

    def __enter__(self) -> Self:
        signal.signal(signal.SIGUSR1, self._make_way)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def take(self, seconds: float) -> None:
        """Wait for the lock, and take it; raise ``TimeoutError`` after so many seconds."""
        until = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self._holder()
                if time.monotonic() > until:
                    which = f" (pid {holder.pid})" if holder else ""
                    raise TimeoutError(f"another process still ships this run{which}") from None
                if holder:
                    holder.send_signal(signal.SIGUSR1)
                time.sleep(0.1)
            else:
                break
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def _holder(self) -> psutil.Process | None:
        """Return the process that has the lock, if that is certain: a file may be older."""
        self._file.seek(0)
        text = self._file.read()
        try:
            process = psutil.Process(int(text))
            words = process.cmdline()
        except (ValueError, psutil.Error):
            return None
        is_one = "fundamentallm_mlflow.ship" in words and str(self._folder) == words[-1]
        return process if is_one else None

    def _make_way(self, *_: Any) -> None:
        if os.getppid() != self._parent:
            sys.stderr.write("another process ships the rest\n")
            sys.stderr.flush()
            os._exit(TOOK_NO_MORE)  # as good as any end: what is in the store is in the ledger
