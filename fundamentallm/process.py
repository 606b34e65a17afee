"""This process: the command that started it, and the signals that end it. Imports no torch."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fundamentallm.run import Run

NAME = "fundamentallm"
log = logging.getLogger(NAME)
ASKS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)


def command_line(*words: object) -> str:
    """Return the shell command that calls ``fundamentallm`` with ``words`` in the way in which this
    process was called: by its name, its path, or ``python -m fundamentallm``."""
    return shlex.join([*_program(), *map(str, words)])


def _program() -> list[str]:
    called = Path(sys.argv[0])
    if called.name == "__main__.py" and called.parent.name == NAME and "-m" in sys.orig_argv:
        return sys.orig_argv[: sys.orig_argv.index("-m") + 2]
    on_path = shutil.which(NAME)
    if called.name == NAME and called.parent != Path():
        # A shell passes on the whole path of what it found by its name.
        same = on_path and Path(on_path).exists() and called.exists() and called.samefile(on_path)
        return [NAME if same else sys.argv[0]]
    # Some other program, or called by its name.
    ours = called.name == NAME or (on_path and Path(on_path).parent == Path(sys.executable).parent)
    return [NAME] if ours else [sys.executable, "-m", NAME]


@contextlib.contextmanager
def signals(run: Run) -> Iterator[None]:
    """Let SIGINT, SIGTERM, SIGUSR1 and ``max_time`` ask for the end at the next safe point;
    a SIGINT after that ends at once."""
    owner, before = os.getpid(), dict[int, signal.Handlers]()

    def ask(number: int, _: object) -> None:
        if os.getpid() != owner:  # a forked child, such as a loader worker, inherits this handler
            _leave_to_parent(number, before[number])
            return
        # Of several processes, all have to stop at the same step.
        if run.signal is not None and number == signal.SIGINT and run.world_size == 1:
            raise KeyboardInterrupt
        # Batch systems announce the end of the time with SIGUSR1; max_time does the same.
        run.receive_signal(signal.SIGUSR1 if number == signal.SIGALRM else number)
        log.warning("%s: stopping at the next safe point", signal.Signals(number).name)

    # Explicitly, since a shell's background job inherits SIGINT as ignored.
    # Python lets only the main thread install handlers.
    main, limit = threading.current_thread() is threading.main_thread(), run.settings.max_time
    for number in ASKS if main else ():
        before[number] = signal.signal(number, ask)  # type: ignore[assignment]
    # After the handlers: without one, SIGALRM ends the process.
    if main and limit:
        signal.setitimer(signal.ITIMER_REAL, limit.seconds or 0)
    try:
        yield
    finally:
        # Before the handlers are restored, for the same reason.
        if main and limit:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for known, old in before.items():
            signal.signal(known, old)


def _leave_to_parent(number: int, before: signal.Handlers) -> None:
    """Handle a signal in a child process. Terminals and batch systems send SIGINT and SIGUSR1 to
    the whole group; the parent needs its workers until it has completed the step."""
    if number == signal.SIGTERM:  # sent to this very process, say by Process.terminate()
        signal.signal(number, before)
        os.kill(os.getpid(), number)
