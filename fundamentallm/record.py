"""What the core writes into a run folder: the lock, the settings, the environment, the outcome."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import attrs
import tomli_w

from fundamentallm import host
from fundamentallm.errors import FundamentalError, StorageError
from fundamentallm.files import write_durably
from fundamentallm.folder import (
    ENVIRONMENT,
    LOCK,
    OUTCOME,
    SETTINGS,
    Ending,
    failed_to_start,
    is_running,
    owner,
)
from fundamentallm.local_code import keep_code, local_files

if TYPE_CHECKING:
    from fundamentallm.run import Run
    from fundamentallm.settings import Composed

LONGEST_ERROR = 500  # characters of an error that outcome.json holds
PATIENCE = 0.5  # seconds


def new_folder(composed: Composed) -> Path:
    """Make a folder for a new run: ``runs/<name>``, or ``runs/<name>-2`` and so on if taken.

    A name is free again if the start of the run that has it failed before anything was built.
    """
    path, run, count = composed.source.path, composed.run, 1
    name = run.name or (path.stem if path else "run")
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        while True:
            folder = run.folder / (name if count == 1 else f"{name}-{count}")
            with contextlib.suppress(FileExistsError):
                # Of two processes that start at once, only one can make it.
                folder.mkdir()
                return folder
            if _taken_over(folder):
                return folder
            count += 1
    except OSError as error:
        raise StorageError(
            f"{run.folder}: no run folder can be made there: {error.strerror}"
        ) from error


def _taken_over(folder: Path) -> bool:
    """Remove the record of a failed start; false if there is none, or another process did."""
    if not failed_to_start(folder) or is_running(folder):
        return False
    with contextlib.suppress(FileNotFoundError):
        (folder / OUTCOME).unlink()  # of two processes, only one can
        (folder / SETTINGS).unlink(missing_ok=True)
        return True
    return False


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder while this process lives; ``StorageError`` if another one has locked it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")  # not "w": that would empty the file of the owner
    except OSError as why:
        raise StorageError(f"{why.filename or folder}: cannot be written: {why.strerror}") from why
    os.register_at_fork(after_in_child=lock.close)  # or it would outlive this process in a child
    with lock:
        _lock(lock, folder)
        with contextlib.suppress(OSError):  # a full disk: the lock itself needs no space
            lock.truncate(0)
            lock.write(json.dumps({"pid": os.getpid(), "started": time.time()}) + "\n")
            lock.flush()
        yield


def _lock(lock: TextIO, folder: Path) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() < until:  # is_running() of another process locks it for a moment
                time.sleep(0.05)
                continue
            one = owner(folder)
            who = f"another process{f' ({one.pid})' if one else ''}"
            raise StorageError(f"{folder}: {who} is training this run") from error
        except OSError as why:
            raise StorageError(f"{folder / LOCK}: cannot be locked: {why.strerror}") from why
        return


def write_record(folder: Path, composed: Composed, step: int) -> None:
    """Write ``settings.toml``, ``environment.json`` and copies of local code for a run that starts
    or continues at ``step``; remove the outcome of an earlier end."""
    import torch

    code = keep_code(folder, local_files(composed.plugins.values()), step)
    around = host.environment(
        composed,
        ("fundamentallm", "torch"),
        seed=composed.run.seed,
        threads=torch.get_num_threads(),
        code=code,
    )
    try:
        # If this process is killed, the run must not show the outcome of an earlier process.
        (folder / OUTCOME).unlink(missing_ok=True)
    except OSError as why:
        raise StorageError(f"{folder / OUTCOME}: cannot be deleted: {why.strerror}") from why
    write_settings(folder, composed)
    write_durably(folder / ENVIRONMENT, json.dumps(around, indent=2) + "\n")


def write_settings(folder: Path, composed: Composed) -> None:
    """Write ``settings.toml``: the composed settings, from which the run can be started again."""
    write_durably(folder / SETTINGS, tomli_w.dumps(composed.tables))


def write_ending(run: Run) -> None:
    """Write how a run ended to ``outcome.json``."""
    error, reason, code = run.error, None, 0
    if error is not None:
        code = error.exit_code if isinstance(error, FundamentalError) else 1
    elif run.outcome == "interrupted" and run.signal is not None:
        # The exit code that shells give a command which a signal has ended.
        reason, code = signal.Signals(run.signal).name, 128 + run.signal
    elif run.outcome == "stopped":
        reason = run.stop_reason
    text = None if error is None else f"{type(error).__name__}: {error}".splitlines()[0]
    facts = Ending(
        run.outcome,
        step=run.progress.step,
        begun=run.begun,
        reason=reason,
        error=text and text[:LONGEST_ERROR],
        exit_code=code,
        time=time.time(),
    )
    write_durably(run.folder / OUTCOME, json.dumps(attrs.asdict(facts)) + "\n")
