"""Which checkpoint to go back to: one that is sound, finite and old enough."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from fundamentallm import StorageError
from fundamentallm_guard.culprit import tensors

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fundamentallm import Run

log = logging.getLogger("fundamentallm")


def newest_sound(run: Run, homes: Iterable[Path], before: int) -> str | None:
    """Return the name of the newest checkpoint from before a step that can be gone back to, or
    None.

    It is there, sound and without NaN and infinity in its weights and the optimizer's state: each
    is read until one is. ``homes`` are folders that hold checkpoints, or folders of them.
    """
    tried: list[int] = []
    # First of all, since whoever saves beside the steps then ends that first: which checkpoints
    # there are must not depend on how fast a disk is.
    step = _read(run, "latest", tried)
    left = _steps(homes)
    while step is None or step >= before:
        left = [one for one in left if one < before and one not in tried]
        if not left:
            return None
        tried.append(max(left))
        step = _read(run, _name(tried[-1]), tried)
    return _name(step)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _steps(homes: Iterable[Path]) -> list[int]:
    """Return the steps of all that is named like a checkpoint, whether or not it is one."""
    paths = [path for home in homes for form in ("step-*", "*/step-*") for path in home.glob(form)]
    found = [re.fullmatch(r"step-(\d+)", path.name) for path in paths]
    return [int(name[1]) for name in found if name]


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
