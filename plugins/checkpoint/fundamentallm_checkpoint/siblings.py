"""All instances of the plugin in a run: what they do together, the first does for all."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fundamentallm_checkpoint import places, store
from fundamentallm_checkpoint.manifest import ALL

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm import Run
    from fundamentallm_checkpoint import Checkpoint

log = logging.getLogger("fundamentallm")


def of(run: Run, cls: type[Checkpoint]) -> dict[str, Checkpoint]:
    """Return all instances, the one named ``checkpoint`` first, whatever the list's order."""
    found = {name: one for name, one in run.plugins.items() if type(one) is cls}
    return {name: found[name] for name in sorted(found, key=lambda n: (n != "checkpoint", n))}


def abandon(run: Run, instance: Checkpoint) -> list[Path]:
    """Set the checkpoints of later steps aside that are in an instance's folder; the first one
    sees to the folders that no instance has any more. Return where they are now."""
    instances, step = of(run, type(instance)).values(), run.progress.step
    moved = [store.abandon(instance.home(run), step, instance.run_id)]
    if instance is next(iter(instances)):
        own = {one.home(run).absolute() for one in instances}
        former = [home for home in places.of(run.folder) if home.absolute() not in own]
        moved += [store.abandon(home, step, instance.run_id, used=False) for home in former]
    return [path for path in moved if path is not None]


def warn(run: Run, instance: Checkpoint) -> None:
    """Warn, once, if no instance saves what a run needs to go on."""
    instances = list(of(run, type(instance)).values())
    if instance is instances[0] and all(one.contents != ALL for one in instances):
        log.warning("no checkpoint will hold more than the model: the run cannot be resumed")
