"""Two small files in the run folder: its id, and the other folders that hold its checkpoints.

Both are on the disk before the first checkpoint: a checkpoint must never belong to an unknown run.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w

from fundamentallm import StorageError
from fundamentallm import folder as run_folder
from fundamentallm_checkpoint.storage import directory, durable_files

if TYPE_CHECKING:
    from fundamentallm import Run

log = logging.getLogger("fundamentallm")

FILE, FOLDERS, SETTINGS = "run-id", run_folder.ELSEWHERE, run_folder.SETTINGS
_FORM = re.compile(r"[0-9a-f]{8,64}")
_LIMIT = 2**20  # bytes


def read_id(folder: Path) -> str:
    """Return the id of the run in ``folder``; empty if it has none yet."""
    path = folder / FILE
    try:
        text = path.read_bytes().decode("ascii", "replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    # Checked, since the id becomes part of a path.
    if not _FORM.fullmatch(text):
        raise StorageError(
            f"{path}: is not the id of a run (8 to 64 of 0-9 and a-f). Every checkpoint of the run"
            ' has the id as "run" in its manifest.json; without the file the folder is a new run\'s'
        )
    return text


def ensure_id(folder: Path, adopted: str) -> str:
    """Return the id of the run in ``folder``; if it has none, give it ``adopted`` or a new one.

    It is durable, with all folders above it, before this returns.
    """
    found = read_id(folder)
    if found:
        return found
    # It comes from a manifest, and becomes part of a path.
    made = adopted if _FORM.fullmatch(adopted) else secrets.token_hex(6)
    try:
        for above in folder.absolute().parents:  # each may be as new as the run folder
            # A folder may be writable below one that cannot be opened.
            with contextlib.suppress(PermissionError):
                durable_files.sync_folder(above)
            if above.is_mount():
                break
        # Last: if there is an id, the folders above are known to be durable.
        durable_files.replace(folder / FILE, f"{made}\n".encode())
    except OSError as error:
        text = f"{error.filename}: cannot be written: {error.strerror}"
        raise StorageError(f"the run folder {folder} cannot be made durable: {text}") from error
    return made


def restore(run: Run, run_id: str, home: Path) -> None:
    """Write the run's id and settings again if the run folder was deleted while the run went on.

    Without them the checkpoints that follow could not be resumed from.
    """
    folder = run.folder
    if run_id and not (folder / FILE).exists():
        log.warning("%s was deleted while the run went on; it is written again", folder / FILE)
        # If this fails, so does the save that follows, with a better message.
        with contextlib.suppress(OSError, StorageError):
            durable_files.make_folder(folder)
            ensure_id(folder, run_id)
            note_home(folder, home)
            if not (folder / SETTINGS).exists():
                durable_files.replace(folder / SETTINGS, tomli_w.dumps(run.tables).encode())


def settings_digest(folder: Path) -> str:
    """Return the SHA-256 of the run's ``settings.toml``; empty if there is none."""
    path = folder / SETTINGS
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def other_runs(place: Path) -> list[str]:
    """Return the ids of the runs that have folders in ``place``."""
    return sorted(path.name for path in place.glob("*/") if _FORM.fullmatch(path.name))


def homes(folder: Path) -> list[Path]:
    """Return all folders that may hold checkpoints of a run, those in the run folder first.

    They include those of instances and settings that the run no longer has.
    """
    own = folder / run_folder.CHECKPOINTS
    return list(dict.fromkeys([own, *directory.homes_below(own), *_noted(folder)]))


def note_home(folder: Path, home: Path) -> None:
    """Record a folder outside of the run folder that holds checkpoints of the run, durably.

    A run whose settings change can then still resume from it.
    """
    home, known = home.absolute(), _noted(folder)
    if home.is_relative_to(folder.absolute()) or home in known:
        return
    # Bytes, since a path need not be valid UTF-8.
    lines = b"".join(os.fsencode(path) + b"\n" for path in [*known, home])
    try:
        durable_files.replace(folder / FOLDERS, lines)
    except OSError as error:
        raise StorageError(f"{error.filename}: cannot be written: {error.strerror}") from error


def _noted(folder: Path) -> list[Path]:
    path = folder / FOLDERS
    try:
        lines = durable_files.read(path, _LIMIT).splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read: {error}") from error
    return [Path(os.fsdecode(line)) for line in lines if line and b"\0" not in line]
