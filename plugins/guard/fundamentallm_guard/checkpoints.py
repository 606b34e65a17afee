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


def step_of(folder: Path) -> int | None:
    """Return the step of a checkpoint folder; None if it is not named ``step-00000500``."""
    found = re.fullmatch(r"step-(\d+)", folder.name)
    return int(found[1]) if found else None


def newest_sound(run: Run, steps: Iterable[int]) -> str | None:
    """Return the name of the newest checkpoint of ``steps`` that can be gone back to, or None.

    Each is read, as whoever keeps checkpoints reads it, until one is there, sound and without NaN
    and infinity in its weights and the optimizer's state.
    """
    for step in sorted(steps, reverse=True):
        name = f"step-{step:08d}"
        try:
            snapshot = _read(run, name)
        except StorageError as error:
            log.debug("%s cannot be gone back to: %s", name, error)
            continue
        if snapshot is None:
            return None
        if _finite([snapshot["model"], snapshot["optimizer"]]):
            return name
        log.warning("%s holds NaN or infinity: looking for an older checkpoint", name)
    return None


def _read(run: Run, name: str) -> dict[str, Any] | None:
    before, run.wanted_checkpoint = run.wanted_checkpoint, name
    try:
        return run.hook.read_checkpoint(run=run)
    finally:
        run.wanted_checkpoint = before


def _finite(tree: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors(tree))
