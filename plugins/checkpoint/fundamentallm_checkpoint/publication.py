"""How a checkpoint comes to be: complete and durable before it has its name."""

from __future__ import annotations

import logging
import secrets
import shutil
from typing import TYPE_CHECKING

import attrs

from fundamentallm import StorageError
from fundamentallm_checkpoint import contents, files
from fundamentallm_checkpoint.manifest import NAME, folder_name, owner

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm import Snapshot
    from fundamentallm_checkpoint.contents import Report
    from fundamentallm_checkpoint.manifest import Manifest

TMP, TRASH = ".tmp-", ".trash-"

log = logging.getLogger("fundamentallm")


def publish(home: Path, snapshot: Snapshot, draft: Manifest, report: Report | None = None) -> Path:
    """Write ``snapshot`` under ``home`` and return its folder, once that survives a power cut.

    The order is the promise: every file durable, the manifest last, then the folder, then its
    name. A failure before the name leaves no trace, and raises ``StorageError``. The run's own
    checkpoint of the same step gives way to the new one; that of another run is an error.
    """
    target = home / folder_name(draft.step)
    work = home / f"{TMP}{draft.step:08d}-{secrets.token_hex(4)}"
    if owner(target) not in (None, draft.run):
        raise StorageError(
            f"{target} is a checkpoint of another run and is not overwritten: move it away"
        )
    try:
        files.make_folder(home)
        with files.claimed(work):
            _fill(work, snapshot, draft, report)
            _name(work, target)
    except OSError as error:
        raise StorageError(
            f"the checkpoint of step {draft.step} could not be saved: {error.filename}:"
            f" {error.strerror}. Earlier checkpoints in {home} are untouched."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def remove_leftover(path: Path) -> None:
    """Delete a folder that no name leads to any more; if that fails, the next start tries again."""
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


def _fill(work: Path, snapshot: Snapshot, draft: Manifest, report: Report | None) -> None:
    written = contents.write(work, snapshot, report)
    if written.poisoned:
        log.warning("step %d: %d of the saved tensors hold NaN or infinity, among them %s",
                    draft.step, len(written.poisoned), written.poisoned[0])  # fmt: skip
    manifest = attrs.evolve(draft, files=written.files, finite=not written.poisoned)
    files.write(work / NAME, manifest.to_json())
    files.sync_folder(work)


def _name(work: Path, target: Path) -> None:
    replaced = None
    if target.exists():  # a folder cannot be renamed over another one that holds something
        replaced = target.with_name(f"{TRASH}{target.name}-{secrets.token_hex(4)}")
        files.rename(target, replaced)
    try:
        files.rename(work, target)
    except OSError:
        if replaced is not None:
            files.rename(replaced, target)
        raise
    files.sync_folder(target.parent)
    if replaced is not None:
        remove_leftover(replaced)
