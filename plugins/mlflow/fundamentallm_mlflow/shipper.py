"""The training process's hold on the process that ships: start it, know how it is, let it end."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import subprocess
import sys
import time
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# A dead server must not block a call for minutes, and nothing is to be sent to anyone else.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}
_ALWAYS = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ASYNC_LOGGING": "false"}

GRACE = 10.0  # seconds that the shipping process may take to give up
LOOK = 0.1  # seconds between two looks at whether somebody asks for the end
SUCCESSORS = 3  # what is killed more often than that is killed for a reason

log = logging.getLogger("fundamentallm")


class Shipper:
    """A running ``ship`` process, which begins to open the store at once.

    It learns of the end, or of the death of this process, from its standard input's end.
    """

    def __init__(self, folder: Path, request: dict[str, Any]) -> None:
        self._folder, self._place, self._uri = folder, request["place"], request["uri"]
        self._patience = float(request["start_seconds"])
        # In a run that is under way a store that is away is no reason to end.
        self._again, self._successors = request | {"strict": False}, SUCCESSORS
        folder.mkdir(parents=True, exist_ok=True)
        self._begin(request)

    def _begin(self, request: dict[str, Any]) -> None:
        with (self._folder / "ship.log").open("ab") as details:
            self._process = subprocess.Popen(
                # -P: a file mlflow.py in the folder of the command is not MLflow.
                [sys.executable, "-P", "-m", "fundamentallm_mlflow.ship", str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=details,
                env=_ENVIRONMENT | dict(os.environ) | _ALWAYS,
                start_new_session=True,  # Ctrl-C is for the training process
            )
        self._pipe = cast("IO[bytes]", self._process.stdout).fileno()
        os.set_blocking(self._pipe, False)
        self._read = b""
        self._since, self._waited = time.monotonic(), 0.0
        self._say(request)

    def open(self, given_up: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Wait for the store, as long as it may take from its start; return the answer. Here and
        in ``attach`` the waiting ends with an error as soon as ``given_up`` is true."""
        self._given_up = given_up
        began = time.monotonic()
        answer = self._answer(self._since + self._patience)
        self._waited = time.monotonic() - began
        return answer

    def attach(self) -> dict[str, Any]:
        """Let it ship the journal, and wait for the MLflow run; return the answer."""
        self._say({})
        # Where building took most of the time, the store still gets some.
        some = min(self._patience - self._waited, self._patience / 3)
        return self._answer(max(self._since + self._patience, time.monotonic() + some))

    def go_on(self) -> None:
        """Let it ship the journal as soon as the store opens, and do not wait for that."""
        self._say({})

    def listen(self) -> None:
        """Pass on what it says about the store, if it says anything; where it was killed, let
        another one take over, a few times. Does not wait."""
        if self._pipe < 0 or self._hear():
            return
        self._pipe = -1
        if self._successors:
            self._successors -= 1
            log.warning("mlflow: the shipping process was killed: another one takes over")
            self._let_go()
            self._begin(self._again)
            self.go_on()
        else:
            log.warning("mlflow: the shipping process ended: the rows wait in %s", self._folder)

    def finish(
        self, patience: float | None, waits: Callable[[], None] = lambda: None
    ) -> str | None:
        """Let the process ship the rest and end; return what went wrong, if anything did. None
        waits as long as rows arrive. ``waits`` is called about once a second meanwhile."""
        self.listen()  # it may have been killed since the last row
        self._hang_up()
        # The process itself gives up after ``patience``: let it say so.
        until = math.inf if patience is None else time.monotonic() + patience + GRACE
        while (code := self._ended()) is None:
            if time.monotonic() > until:
                self.kill()
                return "the store did not take the last rows in time"
            waits()
        if self._pipe >= 0:
            self._hear()
        return {0: None, 3: "the store did not take the last rows in time"}.get(
            code, f"the shipping process ended with code {code}"
        )

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._let_go()

    def why(self, error: str) -> str:
        """Return a sentence on what does not work, with the store's name and no password."""
        said = error.replace(self._uri, self._place)
        return (
            f"mlflow: the store {self._place} cannot be used: {said} "
            f"(details: {self._folder / 'ship.log'})"
        )

    def _let_go(self) -> None:
        self._process.wait()  # it has ended, or is about to: this does not take long
        cast("IO[bytes]", self._process.stdout).close()
        self._hang_up()

    def _hang_up(self) -> None:
        # What it has not heard is lost with it; and the pipe may be closed already.
        with contextlib.suppress(OSError, ValueError):
            cast("IO[bytes]", self._process.stdin).close()

    def _ended(self) -> int | None:
        try:
            return self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return None

    def _hear(self) -> bool:
        """Pass on what there is to read; False at the pipe's end."""
        try:
            part = os.read(self._pipe, 65536)
        except BlockingIOError:
            return True
        *lines, self._read = (self._read + part).split(b"\n")
        for line in lines:
            self._pass_on(json.loads(line))
        return bool(part)

    def _pass_on(self, news: dict[str, Any]) -> None:
        if news.get("state") == "away":
            log.warning("%s; the rows wait in %s", self.why(news["why"]), self._folder)
        elif news.get("state") == "back":
            log.warning("mlflow: the store %s is back", self._place)

    def _say(self, facts: dict[str, Any]) -> None:
        to = cast("IO[bytes]", self._process.stdin)
        try:
            to.write((json.dumps(facts) + "\n").encode())
            to.flush()
        except BrokenPipeError:
            log.debug("mlflow: the shipping process hears nothing")  # its answers' end tells

    def _answer(self, until: float) -> dict[str, Any]:
        """Read the next answer, or make up one that says that there is none."""
        while b"\n" not in self._read:
            left = until - time.monotonic()
            ready, _, _ = select.select([self._pipe], [], [], max(0.0, min(left, LOOK)))
            if not ready and self._given_up():
                return {"error": "nobody waits for it any more"}
            if not ready and left <= 0:
                return {"error": f"it did not open within {self._patience:g} seconds"}
            if not ready:
                continue
            part = os.read(self._pipe, 65536)
            if not part:
                return {"error": "the shipping process did not start"}
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return cast("dict[str, Any]", json.loads(line))
