"""How a run finds what it goes on from, and whether it still is the run that it was."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fundamentallm_checkpoint import changes, choice, identity, places
from fundamentallm_checkpoint.choice import Wish

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm import Run, Snapshot
    from fundamentallm_checkpoint import Checkpoint
    from fundamentallm_checkpoint.choice import Loaded

log = logging.getLogger("fundamentallm")


def read(instances: dict[str, Checkpoint], run: Run, *, resumes: bool) -> Snapshot | None:
    """Return the wanted or the newest sound snapshot of all instances, the first one's first.

    ``resumes``: training goes on from it. Then settings that have changed are told, and those that
    would make it another run are a ``SettingsError``.
    """
    run_id = identity.known(run.folder)
    for instance in instances.values():
        instance.run_id = run_id
    own = [one.home(run) for one in instances.values() if run_id or not one.folder]
    homes = {home.absolute(): home for home in [*own, *places.of(run.folder)]}.values()
    first, *_ = instances.values()
    judge = next((one for one in instances.values() if one.keep_best), first)
    wish = Wish(name=run.wanted_checkpoint, rules=judge.rules(), run=run_id, resumes=resumes)
    for instance in instances.values():
        instance.unsound = wish.unsound
    loaded = choice.load(homes, wish)
    if loaded is None:
        for instance in instances.values():
            _warn_of_namesakes(instance.folder, run, run_id)
        return None
    for instance in instances.values():
        instance.run_id = loaded.manifest.run
    record = loaded.snapshot.pop("settings", None)
    if resumes:
        _check(instances, run, loaded, record)
    log.info("loaded %s", loaded.folder)
    return loaded.snapshot


def _check(
    instances: dict[str, Checkpoint], run: Run, loaded: Loaded, record: dict[str, Any] | None
) -> None:
    """Tell what has changed since the checkpoint; raise if it must not. Format 1 has no record."""
    allowed = [pattern for one in instances.values() for pattern in one.allow_changes]
    own = {f"{name}.allow_changes" for name in instances}
    found = [] if record is None else changes.between(record, run)
    found = [change for change in found if change.key not in own]
    before, now = loaded.manifest.data[:12], run.data.fingerprint[:12]
    if loaded.manifest.data != run.data.fingerprint:
        found.append(changes.Change("data", before, now, binds=True))
    changes.check(found, allowed, f"{next(iter(instances))}.allow_changes")
    for change in found if run.rank == 0 else ():
        log.log(logging.WARNING if change.binds else logging.INFO, "%s", change)


def _warn_of_namesakes(folder: Path | None, run: Run, run_id: str) -> None:
    """Tell of checkpoints that may be those of a run folder that was lost."""
    if folder is None or run_id:
        return
    place = folder / run.folder.name
    for found in identity.namesakes(place):
        log.warning(
            "the checkpoints in %s are another run's and are ignored: %s is a new one's"
            " folder. To continue that run, use its folder; if that is lost, write %s"
            " into %s first",
            place / found,
            run.folder,
            found,
            run.folder / identity.FILE,
        )
