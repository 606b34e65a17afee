"""The checkpoints in a folder: which are there, which to load, which have to go."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import attrs

from fundamentallm import StorageError
from fundamentallm_checkpoint import contents, files, manifest, publication, retention
from fundamentallm_checkpoint.manifest import Manifest, Newer, Unsound, step_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fundamentallm import Snapshot
    from fundamentallm_checkpoint.retention import Rules

SUPERSEDED = "superseded-"

log = logging.getLogger("fundamentallm")


@attrs.frozen
class Loaded:
    """A checkpoint that was verified and read."""

    folder: Path
    manifest: Manifest
    snapshot: Snapshot


def folders(home: Path) -> list[Path]:
    """Return the folders that are named like checkpoints, the newest first."""
    found = [path for path in home.glob("step-*") if step_of(path.name) is not None]
    return sorted(found, key=_step, reverse=True)


def homes_below(home: Path) -> list[Path]:
    """Return the folders directly in ``home`` that hold checkpoints of other instances."""
    below = sorted(path for path in home.glob("*/") if not path.name.startswith((".", SUPERSEDED)))
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


def load(homes: Iterable[Path], wanted: str | None, rules: Rules, run: str = "") -> Loaded | None:
    """Verify and read a checkpoint; None if there is none at all and none is asked for by name.

    Those of other runs than ``run`` are passed over with a warning, whatever is asked for.

    ``wanted`` is ``"best"`` or a checkpoint's name: that one, or ``StorageError``. ``"latest"``
    or None: the newest sound one, with a warning for each newer one that is not sound, and
    ``StorageError`` if none is.
    """
    there, others = parted([f for home in homes for f in folders(home)], run)
    if others:
        log.warning("%d checkpoints of another run than %s are ignored, among them %s",
                    len(others), run, others[0])  # fmt: skip
    there.sort(key=_step, reverse=True)
    chosen = _choose(there, wanted, rules)
    problems = []
    for folder in chosen:
        try:
            return _load(folder)
        except Newer as error:
            raise StorageError(f"{folder}: {error}") from None
        except Unsound as error:
            problems.append(f"{folder}: {error}")
            if folder is not chosen[-1]:
                log.warning("checkpoint %s; trying the next one", problems[-1])
    if not problems:
        return None
    raise StorageError("\n".join(["no sound checkpoint to continue from:", *problems]))


def prune(home: Path, rules: Rules, run: str = "") -> None:
    """Delete what the rules do not keep of a run; what cannot be deleted is a warning."""
    for step in sorted(retention.plan(sound(home, run), rules)):
        folder = home / manifest.folder_name(step)
        try:
            publication.discard(folder)
        except OSError as error:
            log.warning("checkpoint %s could not be deleted: %s", folder, error.strerror)


def prepare(home: Path, step: int, run: str = "") -> None:
    """Make the folder ready for a run that goes on from ``step``; see that it can be written."""
    later = [folder for folder in folders(home) if _step(folder) > step]
    own, others = parted(later, run)
    if others:
        raise StorageError(
            f"{others[0]} is a checkpoint of another run than {run}, and in the way of this one's:"
            f" move it and what else {home} holds of that run away"
        )
    try:
        files.make_folder(home)
        _clean(home)
        _set_aside(home, step, own)
    except OSError as error:
        raise StorageError(f"{error.filename}: {error.strerror}") from error


def _clean(home: Path) -> None:
    """Delete what processes that are dead have left half written or half deleted."""
    leftovers = [path for path in home.glob(f"{publication.TMP}*") if not files.is_claimed(path)]
    for path in [*leftovers, *home.glob(f"{publication.TRASH}*")]:
        publication.remove_leftover(path)


def _set_aside(home: Path, step: int, later: list[Path]) -> None:
    """Move checkpoints of later steps out of the way of a run that goes on from ``step``.

    They belong to a continuation that this run abandons, and would be taken for its newest.
    """
    if not later:
        return
    aside = home / f"{SUPERSEDED}{time.strftime('%Y%m%d-%H%M%S')}"
    files.make_folder(aside)
    for folder in later:
        files.rename(folder, aside / folder.name)
    files.sync_folder(aside)
    files.sync_folder(home)
    log.warning("the run goes on from step %d: %d later checkpoints were moved to %s",
                step, len(later), aside)  # fmt: skip


def _choose(there: list[Path], wanted: str | None, rules: Rules) -> list[Path]:
    if wanted in (None, "latest"):
        return there
    if wanted == "best":
        best = retention.ranked([m for f in there if (m := _manifest(f)) is not None], rules)
        chosen = [f for f in there if best and _step(f) == best[0].step]
        missing = f"no checkpoint tells its {rules.monitor}, so none is the best"
    else:
        name = str(wanted).removeprefix("step-")
        chosen = [f for f in there if name.isdecimal() and _step(f) == int(name)]
        missing = f"there is no checkpoint {wanted!r}"
    if not chosen:
        known = ", ".join(f.name for f in there) or "none"
        raise StorageError(f"{missing} (checkpoints: {known})")
    return chosen


def _load(folder: Path) -> Loaded:
    facts = manifest.read(folder)
    manifest.verify(folder, facts)
    try:
        snapshot = contents.read(folder, facts.files)
    except (OSError, ValueError) as error:
        raise Unsound(str(error)) from error
    if not facts.finite:
        log.warning("checkpoint %s holds NaN or infinity in its weights or moments", folder)
    return Loaded(folder, facts, snapshot)


def _manifest(folder: Path) -> Manifest | None:
    try:
        return manifest.read(folder)
    except Unsound:
        return None


def _step(folder: Path) -> int:
    return step_of(folder.name) or 0
