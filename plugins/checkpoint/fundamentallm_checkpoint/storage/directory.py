"""A folder of checkpoints: list them, delete them, move them away, and clean up.

Hidden names are never taken for checkpoints: ``.tmp-`` is being written or was left half written,
``.old-`` is being replaced, ``.trash-`` is being deleted.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from typing import TYPE_CHECKING

from fundamentallm import StorageError
from fundamentallm_checkpoint.storage import durable_files, manifest, retention
from fundamentallm_checkpoint.storage.manifest import Manifest, UnsoundError, step_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fundamentallm_checkpoint.storage.retention import Rules

TMP, OLD, TRASH, SUPERSEDED = ".tmp-", ".old-", ".trash-", "superseded-"

log = logging.getLogger("fundamentallm")


def home_of(run_folder: Path, instance: str, folder: Path | None, run: str) -> Path:
    """Return the folder of the checkpoints of a plugin instance; ``run`` is the run's id."""
    home = run_folder / "checkpoints"
    if folder:  # many runs may share it, even runs of one name: the id keeps them apart
        home = folder / run_folder.name / run
    return home if instance == "checkpoint" else home / instance


def folders(home: Path) -> list[Path]:
    """Return the folders with names of checkpoints, the newest first."""
    found = [path for path in home.glob("step-*") if step_of(path.name) is not None]
    return sorted(found, key=_step, reverse=True)


def homes_below(home: Path) -> list[Path]:
    """Return the folders directly in ``home`` that hold checkpoints of other instances."""
    hidden = (".", SUPERSEDED)
    below = sorted(path for path in home.glob("*/") if not path.name.startswith(hidden))
    return [path for path in below if step_of(path.name) is None and folders(path)]


def split_by_owner(there: Iterable[Path], run: str) -> tuple[list[Path], list[Path]]:
    """Return the checkpoints of ``run``, and those whose manifests name another run.

    A checkpoint without a readable manifest counts as the run's own, and so do all of them if the
    run has no id yet.
    """
    owners = {folder: manifest.owner(folder) for folder in there if run}
    others = [folder for folder, owner in owners.items() if owner not in (None, run)]
    return [folder for folder in there if folder not in others], others


def sound(home: Path, run: str = "") -> list[Manifest]:
    """Return the manifests of the run's checkpoints whose files all have the right sizes."""
    found = []
    for folder in split_by_owner(folders(home), run)[0]:
        with contextlib.suppress(UnsoundError):
            found.append(manifest.read(folder))
    return found


def still_sound(home: Path, known: Iterable[Manifest]) -> list[Manifest]:
    """Return the known checkpoints whose files still have the right sizes; no file is opened."""
    found = []
    for one in known:
        folder = home / manifest.folder_name(one.step)
        with contextlib.suppress(UnsoundError):
            manifest.check_sizes(folder, one)
            found += [one] if (folder / manifest.NAME).is_file() else []
    return found


def prune(home: Path, existing: Iterable[Manifest], rules: Rules) -> list[Manifest]:
    """Delete the checkpoints that the rules do not keep; return those that are left.

    One that cannot be deleted is a warning, and the next save tries again.
    """
    there = still_sound(home, existing)  # one that was deleted or cut is not one of the last two
    deleted = set()
    for step in sorted(retention.plan(there, rules)):
        folder = home / manifest.folder_name(step)
        try:
            discard(folder)
            deleted.add(step)
        except OSError as error:
            log.warning("checkpoint %s could not be deleted: %s", folder, error.strerror)
    return [one for one in there if one.step not in deleted]


def prepare(home: Path) -> None:
    """Make the folder, and delete what dead processes left in it half written or half deleted."""
    try:
        durable_files.make_folder(home)
        # ``recover`` came first: a checkpoint that is still named ``.old-`` has a successor.
        left = [path for path in home.glob(f"{TMP}*") if not durable_files.is_locked(path)]
        for path in [*left, *home.glob(f"{TRASH}*"), *home.glob(f"{OLD}*")]:
            remove_leftover(path)
    except OSError as error:
        raise StorageError(f"{error.filename}: {error.strerror}") from error


def recover(home: Path) -> None:
    """Rename checkpoints back that were being replaced when the process was killed."""
    for path in home.glob(f"{OLD}*"):
        name = path.name.removeprefix(OLD).rpartition("-")[0]
        with contextlib.suppress(OSError):  # another process did it, or the folder is read-only
            if not (home / name).exists():
                durable_files.rename(path, home / name)


def supersede(home: Path, step: int, run: str = "", *, used: bool = True) -> Path | None:
    """Move the run's checkpoints of later steps than ``step`` into a folder of their own.

    They belong to a continuation that the run gives up, and would be taken for its newest. Returns
    the new folder. Raises ``StorageError`` if later checkpoints of another run are there;
    ``used`` is whether this run saves there.
    """
    own, others = split_by_owner([folder for folder in folders(home) if _step(folder) > step], run)
    if others and used:
        raise StorageError(
            f"{others[0]} is a checkpoint of another run than {run}, where this run will save:"
            f" move it and all others of that run out of {home}"
        )
    if not own:
        return None
    try:
        aside = _move(home, own)
    except OSError as error:
        raise StorageError(f"{error.filename}: {error.strerror}") from error
    log.warning(
        "the run continues from step %d: %d later checkpoints were moved to %s",
        step,
        len(own),
        aside,
    )
    return aside


def discard(folder: Path) -> None:
    """Delete a checkpoint, first its name: half of it must not be taken for a whole one."""
    trash = folder.with_name(f"{TRASH}{folder.name}-{secrets.token_hex(4)}")
    durable_files.rename(folder, trash)
    # Else a power cut could bring the name back, with a part of the files.
    durable_files.sync_folder(folder.parent)
    remove_leftover(trash)


def remove_leftover(path: Path) -> None:
    """Delete a folder that is no checkpoint; if that fails, the next start tries again."""
    try:
        durable_files.remove(path)
    except OSError as error:
        log.warning("%s could not be deleted: %s", path, error.strerror)


def _move(home: Path, later: Iterable[Path]) -> Path:
    name = SUPERSEDED + time.strftime("%Y%m%d-%H%M%S")
    # A run may go back twice within a second.
    count = sum(1 for _ in home.glob(f"{name}*"))
    aside = home / (f"{name}-{count + 1}" if count else name)
    durable_files.make_folder(aside)
    for folder in later:
        durable_files.rename(folder, aside / folder.name)
    durable_files.sync_folder(aside)
    durable_files.sync_folder(home)
    return aside


def _step(folder: Path) -> int:
    return step_of(folder.name) or 0
