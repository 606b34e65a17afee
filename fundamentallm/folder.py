"""What a run folder says of the run: its settings, re-runnable, and the environment it ran in."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w
import torch

from fundamentallm import host
from fundamentallm.errors import StorageError

if TYPE_CHECKING:
    from fundamentallm.settings import Composed


def new_folder(composed: Composed) -> Path:
    """Make a folder for a new run: ``runs/<name>``, or ``runs/<name>-2`` and so on if taken."""
    path, run, count = composed.source.path, composed.run, 1
    name = run.name or (path.stem if path else "run")
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        while True:
            folder = run.folder / (name if count == 1 else f"{name}-{count}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
            count += 1
    except OSError as error:
        raise StorageError(f"{run.folder}: cannot hold a run: {error.strerror}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder while this process lives; ``StorageError`` if another one holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as why:
        raise StorageError(f"{why.filename or folder}: cannot be written: {why.strerror}") from why
    os.register_at_fork(after_in_child=lock.close)  # or it would outlive this process in a child
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError(f"{folder}: another process is training this run") from error
        yield


def write_record(folder: Path, composed: Composed) -> None:
    """Write ``settings.toml`` and ``environment.json``, each whole or not at all."""
    around = host.environment(
        composed,
        ("fundamentallm", "torch"),
        seed=composed.run.seed,
        threads=torch.get_num_threads(),
    )
    texts = {
        "settings.toml": tomli_w.dumps(composed.tables),
        "environment.json": json.dumps(around, indent=2) + "\n",
    }
    try:
        for name, text in texts.items():
            with (folder / f".{name}").open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            (folder / f".{name}").replace(folder / name)
    except OSError as why:
        raise StorageError(f"{why.filename or folder}: cannot be written: {why.strerror}") from why
