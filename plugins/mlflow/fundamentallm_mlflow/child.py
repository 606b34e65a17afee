"""Start, monitor and stop the upload worker (training-process side)."""

from __future__ import annotations

import json
import logging
import math
import os
import select
import subprocess
import sys
import time
from typing import IO, TYPE_CHECKING, Any, cast

from fundamentallm_mlflow.journal import close_in_forks
from fundamentallm_mlflow.sync_state import uploaded_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# The user's environment overrides these. A dead server must not block a call for minutes.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}
# MLflow's asynchronous mode can lose rows on errors, and no step waits for this process.
_FIXED = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ASYNC_LOGGING": "false"}

LOG_FILE = "worker.log"
GRACE_SECONDS = 10.0  # for the worker to exit by itself after its own time limit
SIGNAL_SECONDS = 0.1  # how often a wait checks for a signal
MOST_RESTARTS = 3  # a worker that is killed more often is killed for a reason
TASK = "uploading to MLflow"
SILENT_SECONDS = 3.0

log = logging.getLogger("fundamentallm")


class Worker:
    """A running upload worker, which begins to open the store at once.

    Its commands are in ``fundamentallm_mlflow.worker.__main__``.
    """

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        self._folder, self._masked_uri, self._uri = folder, request["masked_uri"], request["uri"]
        self._start_seconds = float(request["start_seconds"])
        # After the start a missing store must not end the run.
        self._restart_request, self._restarts = request | {"strict": False}, MOST_RESTARTS
        folder.mkdir(parents=True, exist_ok=True)
        self._start(request)
        # The worker sees the end of its input only if no other process has the pipe open.
        close_in_forks(self._close_pipes)

    def _start(self, request: dict[str, Any]) -> None:
        with (self._folder / LOG_FILE).open("ab") as details:
            self._process = subprocess.Popen(
                # -P: a file mlflow.py in the working directory must not be imported as MLflow.
                [sys.executable, "-P", "-m", "fundamentallm_mlflow.worker", str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=details,
                bufsize=0,  # nothing may wait in a buffer that a forked process would flush again
                env=_DEFAULTS | dict(os.environ) | _FIXED,
                start_new_session=True,  # Ctrl-C must reach the training process only
            )
        self._pipe = cast("IO[bytes]", self._process.stdout).fileno()
        os.set_blocking(self._pipe, False)
        self._read = b""
        self._started, self._waited = time.monotonic(), 0.0
        self._send(request)

    def wait_open(self, is_cancelled: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Wait until the store is open, at most ``start_seconds`` from the start; return the reply.

        This method and ``attach`` return an error at once when ``is_cancelled`` becomes true.
        """
        self._is_cancelled = is_cancelled
        began = time.monotonic()
        reply = self._reply(self._started + self._start_seconds)
        self._waited = time.monotonic() - began
        return reply

    def attach(self) -> dict[str, Any]:
        """Let the worker upload the journal, and wait for the MLflow run; return the reply."""
        self.begin_upload()
        # Building data and model may have taken most of the time; the store still gets a third.
        least = min(self._start_seconds - self._waited, self._start_seconds / 3)
        deadline = self._started + self._start_seconds
        return self._reply(max(deadline, time.monotonic() + least))

    def begin_upload(self) -> None:
        """Let the worker upload the journal as soon as the store is open; do not wait."""
        self._send({"upload": True})

    def poll(self) -> None:
        """Log the worker's news of the store; restart a killed worker, a few times. Do not wait."""
        if self._pipe < 0 or self._receive():
            return
        self._pipe = -1
        if self._restarts:
            self._restarts -= 1
            log.warning("mlflow: the upload worker was killed: another one takes over")
            self._reap()
            self._start(self._restart_request)
            self.begin_upload()
        else:
            log.warning("mlflow: the upload worker ended: the rows wait in %s", self._folder)

    def finish(
        self, seconds: float | None, waiting: Callable[[], None] = lambda: None
    ) -> str | None:
        """Let the worker upload the rest and exit; return what went wrong, if anything did.

        ``seconds`` is the worker's own time limit; None waits as long as it takes. ``waiting`` is
        called about once a second meanwhile.
        """
        self.poll()  # it may have been killed since the last row
        self._send_end()
        # The worker gives up by itself after ``seconds``, and its exit code says so.
        deadline = math.inf if seconds is None else time.monotonic() + seconds + GRACE_SECONDS
        while (code := self._exit_code()) is None:
            if time.monotonic() > deadline:
                self.kill()
                return "the store did not take the last rows in time"
            waiting()
        # The pipe may contain news from just before the exit.
        if self._pipe >= 0:
            self._receive()
        return {0: None, 3: "the store did not take the last rows in time"}.get(
            code, f"the upload worker ended with code {code}"
        )

    def leave(self) -> None:
        """Let the worker upload the rest and exit, and do not wait for it."""
        self._send_end()
        self._close_pipes()

    def kill(self) -> None:
        """End the worker at once."""
        # Not SIGTERM, which the worker ignores.
        self._process.kill()
        self._reap()

    def explain(self, error: str) -> str:
        """Return a sentence on what does not work, with the store's name and no password."""
        text = error.replace(self._uri, self._masked_uri)
        return (
            f"mlflow: the store {self._masked_uri} cannot be used: {text} "
            f"(details: {self._folder / LOG_FILE})"
        )

    def _reap(self) -> None:
        self._process.wait()  # it was killed or has ended: this is short
        self._close_pipes()

    def _send_end(self) -> None:
        # An explicit command: the input does not end while a forked process has it open.
        self._send({"end": True})
        cast("IO[bytes]", self._process.stdin).close()

    def _close_pipes(self) -> None:
        self._pipe = -1
        for pipe in (self._process.stdin, self._process.stdout):
            cast("IO[bytes]", pipe).close()

    def _exit_code(self) -> int | None:
        try:
            return self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return None

    def _receive(self) -> bool:
        """Log what the worker has sent; False at the end of the pipe."""
        try:
            part = os.read(self._pipe, 65536)
        except BlockingIOError:
            return True
        *lines, self._read = (self._read + part).split(b"\n")
        for line in lines:
            self._log_news(json.loads(line))
        return bool(part)

    def _log_news(self, news: dict[str, Any]) -> None:
        if news.get("state") == "away":
            log.warning("%s; the rows wait in %s", self.explain(news["why"]), self._folder)
        elif news.get("state") == "back":
            log.warning("mlflow: the store %s is back", self._masked_uri)

    def _send(self, command: dict[str, Any]) -> None:
        left = (json.dumps(command) + "\n").encode()
        try:
            while left:
                left = left[os.write(cast("IO[bytes]", self._process.stdin).fileno(), left) :]
        except (BrokenPipeError, ValueError):  # it has exited, or the pipe is closed already
            log.debug("mlflow: the upload worker takes no command")

    def _reply(self, deadline: float) -> dict[str, Any]:
        """Return the next reply; an error that is marked as late if none comes by ``deadline``."""
        while b"\n" not in self._read:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._pipe], [], [], max(0.0, min(left, SIGNAL_SECONDS)))
            if self._is_cancelled():
                return {"error": "the wait was interrupted by a signal"}
            if not ready and left <= 0:
                error = f"it did not open within {self._start_seconds:g} seconds"
                return {"error": error, "late": True}
            if not ready:
                continue
            part = os.read(self._pipe, 65536)
            if not part:
                return {"error": "the upload worker did not start"}
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return cast("dict[str, Any]", json.loads(line))


class FinalWait:
    """Wait for the worker to upload the remaining rows, with progress."""

    def __init__(
        self, folder: Path, seconds: float, report: Callable[[str, int, int], None]
    ) -> None:
        self._folder, self._seconds, self._report = folder, seconds, report
        self._began = time.monotonic()
        self._percent = -1
        self._announced = False

    def wait(self, worker: Worker) -> str | None:
        """Let the worker end; return what went wrong.

        Nothing is raised: the training is complete, and a problem with the store must not make it
        a failed run.
        """
        try:
            problem = worker.finish(self._seconds, self._show)
        except Exception as error:
            log.debug("mlflow: the final wait", exc_info=True)
            problem = f"{type(error).__name__}: {error}"
        if self._percent >= 0:
            self._report(TASK, 100, 100)
        return problem

    def _show(self) -> None:
        # 100% only after the worker has exited; and each number once, since a terminal without
        # cursor control prints a line for each report.
        size = (self._folder / "journal.jsonl").stat().st_size
        percent = min(99, 100 * uploaded_bytes(self._folder) // max(1, size))
        if percent != self._percent:
            self._percent = percent
            self._report(TASK, percent, 100)
        if not self._announced and time.monotonic() - self._began > SILENT_SECONDS:
            self._announced = True
            log.info(
                "mlflow: waiting for the store to take the last rows, at most %g seconds",
                self._seconds,
            )
