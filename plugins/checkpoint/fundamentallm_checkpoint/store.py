"""The checkpoints in a folder: which are there, and which have to go."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fundamentallm import StorageError
from fundamentallm_checkpoint import files, leftovers, manifest, retention
from fundamentallm_checkpoint.manifest import Manifest, Unsound, step_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fundamentallm_checkpoint.retention import Rules

log = logging.getLogger("fundamentallm")


def home_of(run_folder: Path, instance: str, folder: Path | None, run: str) -> Path:
    """Return the folder that an instance's checkpoints of a run are in."""
    home = run_folder / "checkpoints"
    if folder:  # one folder for the runs of many: their names may well be the same
        home = folder / run_folder.name / run
    return home if instance == "checkpoint" else home / instance


def folders(home: Path) -> list[Path]:
    """Return the folders that are named like checkpoints, the newest first."""
    found = [path for path in home.glob("step-*") if step_of(path.name) is not None]
    return sorted(found, key=_step, reverse=True)


def homes_below(home: Path) -> list[Path]:
    """Return the folders directly in ``home`` that hold checkpoints of other instances."""
    hidden = (".", leftovers.SUPERSEDED)
    below = sorted(path for path in home.glob("*/") if not path.name.startswith(hidden))
    return [path for path in below if step_of(path.name) is None and folders(path)]


def parted(there: Iterable[Path], run: str) -> tuple[list[Path], list[Path]]:
    """Part the checkpoints of ``run`` from those whose manifests name another.

    All are the run's own if it has no id yet, and so is what cannot tell.
    """
    owners = {folder: manifest.owner(folder) for folder in there if run}
    others = [folder for folder, owner in owners.items() if owner not in (None, run)]
    return [folder for folder in there if folder not in others], others


def sound(home: Path, run: str = "") -> list[Manifest]:
    """Return the manifests of the run's checkpoints whose files are all there, by their sizes."""
    found = []
    for folder in parted(folders(home), run)[0]:
        try:
            found.append(manifest.read(folder))
        except Unsound:
            continue
    return found


def prune(home: Path, rules: Rules, run: str = "") -> None:
    """Delete what the rules do not keep of a run; what cannot be deleted is a warning."""
    for step in sorted(retention.plan(sound(home, run), rules)):
        folder = home / manifest.folder_name(step)
        try:
            leftovers.discard(folder)
        except OSError as error:
            log.warning("checkpoint %s could not be deleted: %s", folder, error.strerror)


def prepare(home: Path, run: str = "") -> None:
    """Make the folder ready for a run: no leftovers, and nothing of another run in the way."""
    try:
        files.make_folder(home)
        leftovers.clean(home)
    except OSError as error:
        raise StorageError(f"{error.filename}: {error.strerror}") from error


def abandon(home: Path, step: int, run: str = "", *, used: bool = True) -> Path | None:
    """Move the run's checkpoints of later steps than the one that it goes on from out of the way.

    They belong to a continuation that is abandoned, and would be taken for its newest. Returns
    where they are now; raises ``StorageError`` if another run's are in the way, ``used`` being
    whether this one saves there.
    """
    own, others = parted([folder for folder in folders(home) if _step(folder) > step], run)
    if others and used:
        raise StorageError(
            f"{others[0]} is a checkpoint of another run than {run}, and in the way of this one's:"
            f" move it and what else {home} holds of that run away"
        )
    if not own:
        return None
    try:
        aside = leftovers.set_aside(home, own)
    except OSError as error:
        raise StorageError(f"{error.filename}: {error.strerror}") from error
    log.warning(
        "the run goes on from step %d: %d later checkpoints were moved to %s", step, len(own), aside
    )
    return aside


def _step(folder: Path) -> int:
    return step_of(folder.name) or 0
