"""Choose the checkpoint to rewind to: sound, finite and old enough."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fundamentallm import StorageError, folder
from fundamentallm_guard.diagnose import tensors

if TYPE_CHECKING:
    from fundamentallm import Run

log = logging.getLogger("fundamentallm")


def newest_sound(run: Run, before: int) -> str | None:
    """Return the name of the newest checkpoint from before a step to rewind to, or None.

    It is sound, and its weights and optimizer state are finite: checkpoints are read, newest first,
    until one fits.
    """
    tried: list[int] = []
    # "latest" first: the saver then waits for the save under way, so that which checkpoints exist
    # does not depend on the speed of the disk.
    step = _read(run, "latest", tried)
    left = [one.step for one in folder.checkpoints(run.folder)]
    while step is None or step >= before:
        left = [one for one in left if one < before and one not in tried]
        if not left:
            return None
        tried.append(max(left))
        step = _read(run, _name(tried[-1]), tried)
    return _name(step)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _read(run: Run, name: str, tried: list[int]) -> int | None:
    """Return the step of a checkpoint if it is sound and finite; add what was read to ``tried``."""
    wanted, run.wanted_checkpoint = run.wanted_checkpoint, name
    try:
        snapshot = run.hook.read_checkpoint(run=run)
    except StorageError as error:
        log.debug("cannot rewind to %s: %s", name, error)
        return None
    finally:
        run.wanted_checkpoint = wanted
    if snapshot is None:
        return None
    step: int = snapshot["progress"]["step"]
    tried.append(step)
    if _finite([snapshot["model"], snapshot["optimizer"]]):
        return step
    log.warning("the checkpoint of step %d contains NaN or infinity: trying an older one", step)
    return None


def _finite(tree: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors(tree))
