"""The training process's hold on the process that ships: start it, know how it is, let it end."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from typing import IO, TYPE_CHECKING, Any, cast

from fundamentallm import PluginError

if TYPE_CHECKING:
    from pathlib import Path

# A dead server must not block a call for minutes, and nothing is to be sent to anyone else.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}
_ALWAYS = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_ASYNC_LOGGING": "false"}


class Shipper:
    """A running ``ship`` process. Making one waits until the store is open.

    Raises ``PluginError`` if the store does not open within ``patience`` seconds. The process
    learns of the end, or of the death of this process, from its standard input's end.
    """

    def __init__(self, folder: Path, request: dict[str, Any], patience: float) -> None:
        with (folder / "ship.log").open("ab") as log:
            self._process = subprocess.Popen(
                # -P: a file mlflow.py in the folder of the command is not MLflow.
                [sys.executable, "-P", "-m", "fundamentallm_mlflow.ship", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_ENVIRONMENT | dict(os.environ) | _ALWAYS,
                start_new_session=True,  # Ctrl-C is for the training process
            )
        answer = self._ask(request, patience)
        if "error" in answer:
            self._kill()
            store, details = request["place"], folder / "ship.log"
            said = answer["error"].replace(request["uri"], store)
            raise PluginError(
                f"mlflow: the store {store} cannot be used: {said} (details: {details})"
            )
        self.run_id: str = answer["run_id"]

    def finish(self, patience: float) -> str | None:
        """Let the process ship the rest and end; return what went wrong, if anything did."""
        cast("IO[bytes]", self._process.stdin).close()
        try:
            # The process itself gives up after ``patience``: let it say so.
            code = self._process.wait(patience + 10)
        except subprocess.TimeoutExpired:
            self._kill()
            return "the store did not take the last rows in time"
        return {0: None, 3: "the store did not take the last rows in time"}.get(
            code, f"the shipping process ended with code {code}"
        )

    def _kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, request: dict[str, Any], patience: float) -> dict[str, Any]:
        to, answers = (cast("IO[bytes]", p) for p in (self._process.stdin, self._process.stdout))
        died = {"error": "the shipping process did not start"}
        try:
            to.write((json.dumps(request) + "\n").encode())
            to.flush()
        except BrokenPipeError:
            return died
        line = _first_line(answers.fileno(), patience)
        answers.close()
        if line is None:
            return {"error": f"it did not open within {patience:g} seconds"}
        return cast("dict[str, Any]", json.loads(line)) if line else died


def masked(uri: str) -> str:
    """Return a URI without its password."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", uri)


def _first_line(pipe: int, patience: float) -> bytes | None:
    """Read up to the first line's end or the pipe's; None if neither comes in time."""
    until = time.monotonic() + patience
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return None
        part = os.read(pipe, 65536)
        if not part:
            break
        line += part
    return line
