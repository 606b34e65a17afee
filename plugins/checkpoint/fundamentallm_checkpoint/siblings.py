"""All instances of the plugin in a run: what they do together, the first does for all."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fundamentallm_checkpoint import store
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
    sees to the folders of instances that are no longer listed. Return where they are now."""
    instances = of(run, type(instance)).values()
    homes = [instance.home(run)]
    if instance is next(iter(instances)):
        others = {one.home(run) for one in instances}
        homes += [h for h in store.homes_below(run.folder / "checkpoints") if h not in others]
    moved = [store.abandon(home, run.progress.step, instance.run_id) for home in homes]
    return [path for path in moved if path is not None]


def warn(run: Run, instance: Checkpoint) -> None:
    """Warn, once, if no instance saves what a run needs to go on."""
    instances = list(of(run, type(instance)).values())
    if instance is instances[0] and all(one.contents != ALL for one in instances):
        log.warning("no checkpoint will hold more than the model: the run cannot be resumed")
