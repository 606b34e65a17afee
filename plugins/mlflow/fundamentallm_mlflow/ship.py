"""The process that ships: ``python -m fundamentallm_mlflow.ship FOLDER``.

It reads a request from its standard input and opens the store, while the training process builds
data and model. A second line tells that the journal in FOLDER has the start; from then on it ships
what the journal holds, until the training process ends or dies. It answers in lines of JSON. Exit
codes: 0 all is shipped · 1 the store did not open · 3 the store took no more.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import re
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm_mlflow.turn import Turn
from fundamentallm_mlflow.work import Work

if TYPE_CHECKING:
    from collections.abc import Callable

POLL_SECONDS = 3.0  # each time costs some milliseconds; pages of MLflow look for news every 30 s
LONGEST_PAUSE = 30.0

log = logging.getLogger("ship")


class Answers:
    """The way back to the training process, which may be gone."""

    def __init__(self) -> None:
        # Whatever a library prints belongs into the log, not into the answers.
        self._pipe = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def tell(self, **facts: Any) -> None:
        """Send a line."""
        try:
            self._pipe.write(json.dumps(facts) + "\n")
            self._pipe.flush()
        except OSError:
            log.warning("the training process is gone already")


class Loop:
    """Ships until the training process is gone and all is in the store."""

    def __init__(self, work: Work, answers: Answers, request: dict[str, Any]) -> None:
        self._work, self._answers = work, answers
        self._parent, self._patience = request["parent"], request["end_seconds"]
        self._pause = 0.0
        self._gone_at: float | None = None
        self.away = False
        """Whether the store took nothing the last time, which has been told."""

    def run(self) -> int:
        """Ship, and give up ``end_seconds`` after the training is gone; return the exit code."""
        while True:
            if self._gone_at is None and _gone(self._parent, POLL_SECONDS + self._pause):
                self._gone_at, self._pause = time.monotonic(), 0.0
            elif self._gone_at is not None:
                left = self._gone_at + self._patience - time.monotonic()
                time.sleep(max(0.0, min(self._pause, left)))
            if self._attempt() and self._gone_at is not None:
                return 0
            if self._gone_at is not None and time.monotonic() - self._gone_at >= self._patience:
                return 3

    def _attempt(self) -> bool:
        try:
            self._work.measure()
            self._work.ship()
            if self._gone_at is not None:
                self._work.end()
        except Exception as error:
            log.exception("the store takes nothing")
            if not self.away:
                self._answers.tell(state="away", why=reason(error))
            self.away, self._pause = True, min(LONGEST_PAUSE, 2 * self._pause + 1)
            return False
        if self.away:
            self._answers.tell(state="back", **self._work.attach())
        self.away, self._pause = False, 0.0
        return True


def main() -> int:
    """Run the process; see the module."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the training process hears them, and ends this one
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    answers, folder = Answers(), Path(sys.argv[1])
    request = json.loads(sys.stdin.buffer.readline())
    with Turn(folder, request["parent"]) as turn:
        return _serve(Work(request, folder, turn), answers, request)


def _serve(work: Work, answers: Answers, request: dict[str, Any]) -> int:
    def opened() -> dict[str, Any]:
        work.open()
        return {"opened": True}

    is_open = _answered(opened, answers)
    if request["strict"] and not is_open:
        return 1
    if not sys.stdin.buffer.readline():
        return 0  # nothing was built, so there is nothing to tell of
    is_attached = is_open and _answered(work.attach, answers)
    if request["strict"] and not is_attached:
        return 1
    _step_back()
    gc.freeze()  # mlflow's modules: looking through them again and again takes a fifth of the time
    loop = Loop(work, answers, request)
    loop.away = not is_attached
    return loop.run()


def _answered(part: Callable[[], dict[str, Any]], answers: Answers) -> bool:
    try:
        facts = part()
    except Exception as error:
        log.exception("the store cannot be used")
        answers.tell(error=reason(error))
        return False
    answers.tell(**facts)
    return True


def reason(error: Exception) -> str:
    """Return what is wrong in a line, with what to do where that is known."""
    lines = str(error).strip().splitlines()
    text = (lines[0] if lines else type(error).__name__)[:500]
    schema = re.search(r"found version (\w+), but expected (\w+)", text)
    if schema:
        from mlflow.version import VERSION

        return (
            f"the database has schema {schema[1]}, and this mlflow {VERSION} knows "
            f"{schema[2]}: install the mlflow that made it, or, if it is the older one, "
            "back it up and run 'mlflow db upgrade'"
        )
    if "Response body: '<" in text or "failed with error code 404" in text:
        code = re.search(r"error code (\d+)", text)
        said = f" (it says {code[1]})" if code else ""
        return f"what answers there is no MLflow server{said}: correct tracking_uri"
    if "failed with exception" in text and (cause := _cause(error)):
        return f"{cause}: start its server, or set tracking_uri to a store that is there"
    return text


def _cause(error: BaseException) -> str | None:
    """Return what the operating system said, below all that libraries put around it."""
    found, seen, last = None, set[int](), error
    while id(last) not in seen:
        seen.add(id(last))
        if isinstance(last, TimeoutError):
            found = "it does not answer in time"
        elif isinstance(last, OSError) and isinstance(last.errno, int):
            found = last.strerror
        inner = (one for one in last.args if isinstance(one, BaseException))
        last = last.__cause__ or last.__context__ or next(inner, last)
    return found


def _step_back() -> None:
    """Let the training come first from here on: wait for a core, and take none from it."""
    os.nice(5)
    with contextlib.suppress(AttributeError, OSError):  # a system that has no such thing
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _gone(parent: int, seconds: float) -> bool:
    """Wait for the training process to close our input or to die, at most so long."""
    closed, _, _ = select.select([0], [], [], seconds)
    # Where it died, a worker process that it forked may still hold the other end of the input.
    return bool(closed) or os.getppid() != parent


if __name__ == "__main__":
    sys.exit(main())
