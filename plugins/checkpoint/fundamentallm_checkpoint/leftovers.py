"""What no name leads to any more: half written, half deleted, or abandoned."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from typing import TYPE_CHECKING

from fundamentallm_checkpoint import files

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

TMP, OLD, TRASH, SUPERSEDED = ".tmp-", ".old-", ".trash-", "superseded-"

log = logging.getLogger("fundamentallm")


def remove_leftover(path: Path) -> None:
    """Delete a folder that no name leads to; if that fails, the next start tries again."""
    try:
        files.remove(path)
    except OSError as error:
        log.warning("%s could not be deleted: %s", path, error.strerror)


def discard(folder: Path) -> None:
    """Delete a checkpoint. It loses its name first: no half of it can be taken for a whole."""
    trash = folder.with_name(f"{TRASH}{folder.name}-{secrets.token_hex(4)}")
    files.rename(folder, trash)
    files.sync_folder(folder.parent)
    remove_leftover(trash)


def clean(home: Path) -> None:
    """Delete what processes that are dead have left half written or half deleted."""
    left = [path for path in home.glob(f"{TMP}*") if not files.is_claimed(path)]
    for path in [*left, *home.glob(f"{TRASH}*"), *home.glob(f"{OLD}*")]:
        remove_leftover(path)


def recover(home: Path) -> None:
    """Give checkpoints their names back that were to be replaced when the process was killed."""
    for path in home.glob(f"{OLD}*"):
        name = path.name.removeprefix(OLD).rpartition("-")[0]
        with contextlib.suppress(OSError):  # another process was faster, or it is of no use
            if not (home / name).exists():
                files.rename(path, home / name)


def set_aside(home: Path, later: Iterable[Path]) -> Path:
    """Move checkpoints of a continuation that is abandoned into a folder of their own, where none
    of them is taken for the run's newest; return that folder."""
    name = SUPERSEDED + time.strftime("%Y%m%d-%H%M%S")
    count = sum(1 for _ in home.glob(f"{name}*"))
    aside = home / (f"{name}-{count + 1}" if count else name)
    files.make_folder(aside)
    for folder in later:
        files.rename(folder, aside / folder.name)
    files.sync_folder(aside)
    files.sync_folder(home)
    return aside
