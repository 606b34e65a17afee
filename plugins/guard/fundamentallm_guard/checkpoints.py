"""Which checkpoint to go back to: one that is sound, finite and old enough."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from fundamentallm import StorageError
from fundamentallm_guard.culprit import tensors

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm import Run

log = logging.getLogger("fundamentallm")


def step_of(folder: Path) -> int | None:
    """Return the step of a checkpoint folder; None if it is not named ``step-00000500``."""
    found = re.fullmatch(r"step-(\d+)", folder.name)
    return int(found[1]) if found else None


def newest_sound(run: Run, known: list[int], before: int) -> str | None:
    """Return the name of the newest checkpoint from before a step that can be gone back to, or
    None.

    It is there, sound and without NaN and infinity in its weights and the optimizer's state: each
    is read until one is. ``known`` are the steps of those that were saved; reading may add to it.
    """
    tried: list[int] = []
    # First of all, since whoever saves beside the steps then ends that first: which checkpoints
    # there are must not depend on how fast a disk is.
    name = "latest"
    while True:
        step = _read(run, name, tried)
        if step is not None and step < before:
            return f"step-{step:08d}"
        left = [step for step in known if step < before and step not in tried]
        if not left:
            return None
        tried.append(max(left))
        name = f"step-{tried[-1]:08d}"


def _read(run: Run, name: str, tried: list[int]) -> int | None:
    """Return the step of a checkpoint that is sound and finite, and note it in ``tried``."""
    wanted, run.wanted_checkpoint = run.wanted_checkpoint, name
    try:
        snapshot = run.hook.read_checkpoint(run=run)
    except StorageError as error:
        log.debug("%s cannot be gone back to: %s", name, error)
        return None
    finally:
        run.wanted_checkpoint = wanted
    if snapshot is None:
        return None
    step: int = snapshot["progress"]["step"]
    tried.append(step)
    if _finite([snapshot["model"], snapshot["optimizer"]]):
        return step
    log.warning("the checkpoint of step %d holds NaN or infinity: looking for an older one", step)
    return None


def _finite(tree: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors(tree))
