"""Which run a run folder is of: a small file in it, written once, that its checkpoints repeat."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import secrets
import time
from typing import TYPE_CHECKING

import tomli_w

from fundamentallm import StorageError
from fundamentallm_checkpoint import files, places
from fundamentallm_checkpoint.manifest import Manifest

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm import Run

log = logging.getLogger("fundamentallm")

FILE, SETTINGS = "run-id", "settings.toml"
_FORM = re.compile(r"[0-9a-f]{8,64}")


def known(folder: Path) -> str:
    """Return the id of the run in ``folder``; empty if it has none yet."""
    path = folder / FILE
    try:
        text = path.read_bytes().decode("ascii", "replace").strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    if not _FORM.fullmatch(text):
        raise StorageError(
            f"{path}: is not the id of a run (8 to 64 of 0-9 and a-f). Every checkpoint of the run"
            ' has it as "run" in its manifest.json; a folder without the file is a new run\'s.'
        )
    return text


def namesakes(place: Path) -> list[str]:
    """Return the ids of runs that have folders in ``place``."""
    return sorted(path.name for path in place.glob("*/") if _FORM.fullmatch(path.name))


def restore(run: Run, run_id: str, home: Path) -> None:
    """Write again what tells a run folder from others and lets it be resumed, if it was deleted
    while the run went on."""
    folder = run.folder
    if run_id and not (folder / FILE).exists():
        log.warning("%s was deleted while the run went on; it is made again", folder / FILE)
        # Where even that is refused, so is the save, which says more.
        with contextlib.suppress(OSError, StorageError):
            files.make_folder(folder)
            settle(folder, run_id)
            places.note(folder, home)
            if not (folder / SETTINGS).exists():
                _replace(folder, SETTINGS, tomli_w.dumps(run.tables).encode())


def settle(folder: Path, adopted: str) -> str:
    """Return the id of the run in ``folder``; if it has none, give it ``adopted`` or a new one.

    It is on the disk before this returns: no checkpoint can be of a run that nobody knows.
    """
    found = known(folder)
    if found:
        return found
    made = adopted if _FORM.fullmatch(adopted) else secrets.token_hex(6)
    try:
        for above in folder.absolute().parents:  # its own name, and those that are new with it
            with contextlib.suppress(PermissionError):  # one may write below what one may not read
                files.sync_folder(above)
            if above.is_mount():
                break
        # Last: where there is an id, all of this has been done.
        _replace(folder, FILE, f"{made}\n".encode())
    except OSError as error:
        what = f"{error.filename}: cannot be written: {error.strerror}"
        raise StorageError(f"the run folder {folder} cannot be made to last: {what}") from error
    return made


def _replace(folder: Path, name: str, data: bytes) -> None:
    beside = folder / f".{name}"
    beside.unlink(missing_ok=True)
    files.write(beside, data)
    files.rename(beside, folder / name)
    files.sync_folder(folder)


def draft(
    run: Run, run_id: str, *, metrics: dict[str, float], tags: tuple[str, ...], contents: str
) -> Manifest:
    """Return the manifest of a checkpoint of the run as it stands, which lists no files yet."""
    settings = run.folder / SETTINGS
    known = hashlib.sha256(settings.read_bytes()).hexdigest() if settings.is_file() else ""
    return Manifest(
        step=run.progress.step,
        run=run_id,
        created=time.time(),
        settings=known,
        data=run.data.fingerprint,
        metrics=metrics,
        tags=tags,
        contents=contents,
    )
