"""One upload session: the lock on the folder, the store, and the parts of the work in order."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil  # type: ignore[import-untyped]

from fundamentallm_mlflow.worker.system_metrics import SystemMetrics

if TYPE_CHECKING:
    from fundamentallm_mlflow.worker.client import Client
    from fundamentallm_mlflow.worker.sync import Sync

LOCK_FILE = ".lock"
NOT_UPLOADED = 3
"""Exit code: the store did not take everything."""

log = logging.getLogger("worker")


class FolderLock:
    """A lock on the folder, so that one worker at a time uploads it; the file contains the pid.

    A worker that waits for the lock sends SIGUSR1 to its owner. An owner whose training process
    has exited ends on that signal, and the waiting worker uploads the rest.
    """

    def __init__(self, folder: Path, training_pid: int) -> None:
        self._folder = folder.resolve()
        self._training_pid = training_pid
        # Not "w": to open the file must not erase the pid of the owner.
        self._file = (folder / LOCK_FILE).open("a+")

    def __enter__(self) -> Self:
        signal.signal(signal.SIGUSR1, self._yield)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def acquire(self, seconds: float) -> None:
        """Wait for the lock and take it; raise ``TimeoutError`` after ``seconds``."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = self._owner()
                if time.monotonic() > deadline:
                    which = f" (pid {owner.pid})" if owner else ""
                    raise TimeoutError(f"another process still uploads this run{which}") from None
                if owner:
                    owner.send_signal(signal.SIGUSR1)
                time.sleep(0.1)
            else:
                break
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def _owner(self) -> psutil.Process | None:
        """Return the process that has the lock; None if the pid in the file may be outdated."""
        self._file.seek(0)
        text = self._file.read()
        try:
            process = psutil.Process(int(text))
            command = process.cmdline()
        except (ValueError, psutil.Error):
            return None
        # The pid may have been reused: only a worker of this folder may get a signal.
        is_worker = "fundamentallm_mlflow.worker" in command and str(self._folder) == command[-1]
        return process if is_worker else None

    def _yield(self, *_: Any) -> None:
        if os.getppid() != self._training_pid:
            sys.stderr.write("another process uploads the rest\n")
            sys.stderr.flush()
            os._exit(NOT_UPLOADED)  # safe at any moment: runs.json says what the store has


class Session:
    """The work for one request. Each method does what is left of its part.

    A method raises what the store raises, and can be called again. Importing mlflow is part of
    ``open``, since it may fail, too.
    """

    def __init__(
        self, request: dict[str, Any], folder: Path, lock: FolderLock | None = None
    ) -> None:
        self._request = request
        self._folder = folder
        self._lock = lock
        self._client: Client | None = None
        self.sync: Sync | None = None
        self._system: SystemMetrics | None = None

    def acquire(self) -> None:
        """Wait until no other worker uploads this folder."""
        if self._lock is not None:
            # The other half of the time is for the store.
            self._lock.acquire(self._request["start_seconds"] / 2)
            # The folder stays locked until the file is closed, at the end of the process.
            self._lock = None

    def open(self) -> None:
        """Open the store."""
        self.acquire()
        from fundamentallm_mlflow.worker.client import Client

        if self._client is None:
            self._client = Client(self._request["uri"], self._request["experiment"])

    def attach(self) -> dict[str, str]:
        """Create or find the MLflow run; return its ids."""
        from fundamentallm_mlflow.worker.sync import Sync

        self.open()
        if self.sync is None:
            store, experiment = self._request["masked_uri"], self._request["experiment"]
            assert self._client is not None
            self.sync = Sync(self._folder, store, experiment, self._client)
        run = self.sync.run
        return {"run_id": run.run_id, "experiment_id": run.experiment_id}

    def measure(self) -> None:
        """Measure the machine if the interval has passed. The journal must have its start row."""
        seconds = self._request["system_seconds"]
        if not seconds:
            return
        # Two workers must not append to one ``system.jsonl``.
        self.acquire()
        try:
            if self._system is None:
                pid = self._request["training_pid"]
                self._system = SystemMetrics(self._folder, pid, seconds)
            self._system.measure()
        except Exception:
            # Uploading must not depend on it.
            log.exception("the machine is no longer measured")
            self._request["system_seconds"] = 0

    def upload(self) -> None:
        """Upload everything that exists now."""
        self.attach()
        assert self.sync is not None
        self.sync.upload()
        self.sync.upload_samples(Path(self._request["run_folder"]))

    def end(self) -> None:
        """Set the end state, and upload the plot of the whole run."""
        assert self.sync is not None
        assert self._client is not None
        if self.sync.is_complete:
            return
        # Before the plot, which may fail: the MLflow run must not stay RUNNING.
        self.sync.close()
        if self._request["plot"]:
            from fundamentallm_mlflow.worker.plot import draw

            picture = draw(self._folder)
            if picture is not None:
                self._client.add_file(self.sync.run.run_id, picture)


def explain(error: Exception) -> str:
    """Return one line on what is wrong, with the remedy where it is known."""
    lines = str(error).strip().splitlines()
    text = (lines[0] if lines else type(error).__name__)[:500]
    # MLflow raises one type for all of these, so only its texts distinguish them.
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
        answer = f" (it answers {code[1]})" if code else ""
        return f"this is not an MLflow server{answer}: correct tracking_uri"
    if "failed with exception" in text and (cause := _cause(error)):
        return f"{cause}: start its server, or set tracking_uri to a store that is there"
    return text


def _cause(error: BaseException) -> str | None:
    """Return the operating system's message, without the texts that libraries add."""
    found, seen, last = None, set[int](), error
    while id(last) not in seen:
        seen.add(id(last))
        if isinstance(last, TimeoutError):
            found = "it does not answer in time"
        elif isinstance(last, OSError) and isinstance(last.errno, int):
            found = last.strerror
        # urllib3 and requests put the cause into the arguments, not into __cause__.
        inner = (one for one in last.args if isinstance(one, BaseException))
        last = last.__cause__ or last.__context__ or next(inner, last)
    return found
