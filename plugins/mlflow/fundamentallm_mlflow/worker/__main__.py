"""The upload worker: ``python -m fundamentallm_mlflow.worker FOLDER``.

It reads commands from standard input, one JSON object per line:

1. the request: open the store, while the training process builds data and model;
2. ``{"upload": true}``: the journal in FOLDER has its start row; upload what is appended to it;
3. ``{"end": true}``: no row follows; upload the rest and exit.

The end of the input and the death of the training process have the same effect as the last one.
Replies are JSON lines on standard output. Exit codes: 0 everything is uploaded; 1 the store did not
open; 3 the store did not take everything.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm_mlflow.worker.session import NOT_UPLOADED, FolderLock, Session, explain

if TYPE_CHECKING:
    from collections.abc import Callable

# Each upload costs some milliseconds, and MLflow's pages refresh every 30 seconds.
POLL_SECONDS = 3.0
LONGEST_PAUSE = 30.0
PARENT_SECONDS = 1.0  # how often the wait for a command checks that the training process lives

log = logging.getLogger("worker")


class Replies:
    """The pipe back to the training process, which may have exited."""

    def __init__(self) -> None:
        # What a library prints must go into the log, not among the replies.
        self._pipe = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **facts: Any) -> None:
        """Write a line."""
        try:
            self._pipe.write(json.dumps(facts) + "\n")
            self._pipe.flush()
        except OSError:
            log.warning("the training process has exited")


class Commands:
    """The commands of the training process.

    Not a buffered reader: ``select`` does not see what a buffer has already read.
    """

    def __init__(self, training_pid: int | None = None) -> None:
        self.training_pid = training_pid
        self._read = b""
        self._closed = False

    def wait(self) -> dict[str, Any] | None:
        """Wait for the next command; None if none can follow any more."""
        while True:
            command = self.within(PARENT_SECONDS)
            if command is not None or self.is_over:
                return command

    def within(self, seconds: float) -> dict[str, Any] | None:
        """Return the next command if it arrives within ``seconds``."""
        if b"\n" not in self._read and not self._closed:
            ready, _, _ = select.select([0], [], [], seconds)
            part = os.read(0, 65536) if ready else b""
            self._closed = bool(ready) and not part
            self._read += part
        line, newline, rest = self._read.partition(b"\n")
        if not newline:
            return None
        self._read = rest
        command: dict[str, Any] = json.loads(line)
        return command

    @property
    def is_over(self) -> bool:
        """Whether the training process cannot send any command.

        A process that it forked may still have the other end of the input open, so the end of
        the input alone does not show that the training process has exited.
        """
        is_orphan = self.training_pid is not None and os.getppid() != self.training_pid
        return self._closed or is_orphan


class UploadLoop:
    """Uploads until the training has ended and everything is in the store."""

    def __init__(
        self, session: Session, replies: Replies, commands: Commands, request: dict[str, Any]
    ) -> None:
        self._session, self._replies, self._commands = session, replies, commands
        self._end_seconds = request["end_seconds"]
        self._pause = 0.0
        self._ended_at: float | None = None
        self.away = False
        """Whether the last attempt failed; the training process knows it."""

    def run(self) -> int:
        """Upload, at most ``end_seconds`` after the end of the training; return the exit code."""
        while True:
            if self._ended_at is None and self._has_ended(POLL_SECONDS + self._pause):
                self._ended_at, self._pause = time.monotonic(), 0.0
            elif self._ended_at is not None:
                left = self._ended_at + self._end_seconds - time.monotonic()
                # Not ``within``: after the last command it may return at once, without a pause.
                time.sleep(max(0.0, min(self._pause, left)))
            if self._attempt() and self._ended_at is not None:
                return 0
            if self._ended_at is not None and (
                time.monotonic() - self._ended_at >= self._end_seconds
            ):
                return NOT_UPLOADED

    def _has_ended(self, seconds: float) -> bool:
        """Wait for the end of the training, at most ``seconds``."""
        command = self._commands.within(seconds)
        return bool(command and command.get("end")) or self._commands.is_over

    def _attempt(self) -> bool:
        try:
            # Before the upload, so that an unreachable store costs no measurement.
            self._session.measure()
            self._session.upload()
            if self._ended_at is not None:
                self._session.end()
        except Exception as error:
            log.exception("the store takes nothing")
            if not self.away:
                self._replies.send(state="away", why=explain(error))
            self.away, self._pause = True, min(LONGEST_PAUSE, 2 * self._pause + 1)
            return False
        if self.away:
            self._replies.send(state="back", **self._session.attach())
        self.away, self._pause = False, 0.0
        return True


def main() -> int:
    """Run the process; see the module."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # The training process receives them and ends this one.
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    replies, commands, folder = Replies(), Commands(), Path(sys.argv[1])
    request = commands.wait()
    if request is None:
        return 0
    # Not ``os.getppid()``: the training process may have died before this one asks.
    commands.training_pid = request["training_pid"]
    with FolderLock(folder, request["training_pid"]) as lock:
        return _serve(Session(request, folder, lock), replies, commands, request)


def _serve(session: Session, replies: Replies, commands: Commands, request: dict[str, Any]) -> int:
    def opened() -> dict[str, Any]:
        session.open()
        return {"opened": True}

    is_open = _replied(opened, replies)
    if request["strict"] and not is_open:
        return 1
    command = commands.wait()
    if command is None or not command.get("upload"):
        return 0  # the run failed before its training: there is nothing to upload
    is_attached = is_open and _replied(session.attach, replies)
    if request["strict"] and not is_attached:
        return 1
    # Not earlier: until here the training process waits for this one.
    _lower_priority()
    gc.freeze()  # a fifth of the time went into collections that visit mlflow's modules
    loop = UploadLoop(session, replies, commands, request)
    loop.away = not is_attached
    return loop.run()


def _replied(part: Callable[[], dict[str, Any]], replies: Replies) -> bool:
    try:
        facts = part()
    except Exception as error:
        log.exception("the store cannot be used")
        replies.send(error=explain(error))
        return False
    replies.send(**facts)
    return True


def _lower_priority() -> None:
    """Let the training process have the cores first."""
    os.nice(5)
    with contextlib.suppress(AttributeError, OSError):  # not on every operating system
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


if __name__ == "__main__":
    sys.exit(main())
