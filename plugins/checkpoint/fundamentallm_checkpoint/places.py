"""Where a run's checkpoints may be: also in folders that its settings no longer name."""

from __future__ import annotations

import os
from pathlib import Path

from fundamentallm import StorageError
from fundamentallm_checkpoint import files, store

FILE = "checkpoint-folders"
_LIMIT = 2**20


def of(run_folder: Path) -> list[Path]:
    """Return all folders that may hold checkpoints of a run, those in the run folder first."""
    own = run_folder / "checkpoints"
    return list(dict.fromkeys([own, *store.homes_below(own), *_noted(run_folder)]))


def note(run_folder: Path, home: Path) -> None:
    """Write down that a folder outside of the run folder holds checkpoints of the run: whoever
    changes the settings goes on from them all the same. It is on the disk before this returns."""
    home, known = home.absolute(), _noted(run_folder)
    if home.is_relative_to(run_folder.absolute()) or home in known:
        return
    beside = run_folder / f".{FILE}"
    try:
        beside.unlink(missing_ok=True)
        files.write(beside, b"".join(os.fsencode(path) + b"\n" for path in [*known, home]))
        files.rename(beside, run_folder / FILE)
        files.sync_folder(run_folder)
    except OSError as error:
        raise StorageError(f"{error.filename}: cannot be written: {error.strerror}") from error


def _noted(run_folder: Path) -> list[Path]:
    path = run_folder / FILE
    try:
        lines = files.read(path, _LIMIT).splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read: {error}") from error
    return [Path(os.fsdecode(line)) for line in lines if line and b"\0" not in line]
