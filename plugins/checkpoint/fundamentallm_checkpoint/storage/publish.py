"""Write a checkpoint so that it has a name only once it is complete and durable."""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
from typing import TYPE_CHECKING

import attrs

from fundamentallm import StorageError
from fundamentallm_checkpoint.storage import durable_files, snapshot
from fundamentallm_checkpoint.storage.directory import OLD, TMP, remove_leftover
from fundamentallm_checkpoint.storage.manifest import NAME, folder_name, owner

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm_checkpoint.storage.manifest import Manifest
    from fundamentallm_checkpoint.storage.snapshot import PackedSnapshot, Report

_MARGIN = 2**16  # bytes for headers and the manifest

log = logging.getLogger("fundamentallm")


class NotSavedError(StorageError):
    """The disk refused a checkpoint; earlier checkpoints are untouched."""


def publish(
    home: Path, packed: PackedSnapshot, draft: Manifest, report: Report | None = None
) -> Manifest:
    """Write a checkpoint into the folder ``home`` and return its manifest, once it is durable.

    ``draft`` is the manifest without files. The order is the promise: every file durable, the
    manifest last, then the folder, then the name. A failure before the name leaves no trace, and
    raises ``NotSavedError`` if it is the disk's. The run's own checkpoint of the same step is
    replaced; one of another run is a ``StorageError``.
    """
    target = home / folder_name(draft.step)
    work = home / f"{TMP}{draft.step:08d}-{secrets.token_hex(4)}"
    # Exists only if a person put it there, or a run repeats the step that it resumed from.
    if target.exists() and owner(target) not in (None, draft.run):
        raise StorageError(
            f"{target} is a checkpoint of another run and is not overwritten: move it away"
        )
    try:
        durable_files.make_folder(home)
        check_space(home, packed.size)
        # The lock shows other processes that this folder is in use, and not a leftover.
        with durable_files.locked_folder(work):
            written = _fill(work, packed, draft, report)
            _name(work, target)
    except OSError as error:
        state = "are untouched" if home.is_dir() else "were deleted by another program"
        raise NotSavedError(
            f"the checkpoint of step {draft.step} could not be saved: {error.filename}:"
            f" {error.strerror}. Earlier checkpoints in {home} {state}."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            if work.exists():
                durable_files.remove(work)
    return written


def check_space(home: Path, size: int) -> None:
    """Raise ``OSError`` if the disk of a folder has no room for a checkpoint of ``size`` bytes."""
    free, needed = durable_files.free_space(home), size + size // 100 + _MARGIN
    if free is not None and free < needed:
        text = f"No space left on device: {needed:,} bytes are needed, and {free:,} are free"
        raise OSError(errno.ENOSPC, text, str(home))


def probe(home: Path) -> None:
    """Write and delete a small file; raise ``OSError`` if a folder cannot be written."""
    work = home / f"{TMP}probe-{secrets.token_hex(4)}"
    try:
        with durable_files.locked_folder(work):
            durable_files.write(work / NAME, b"{}\n")
    finally:
        if work.exists():
            durable_files.remove(work)


def _fill(work: Path, packed: PackedSnapshot, draft: Manifest, report: Report | None) -> Manifest:
    written = snapshot.write(work, packed, report)
    if written.nonfinite:
        log.warning(
            "step %d: %d of the saved tensors hold NaN or infinity, among them %s",
            draft.step,
            len(written.nonfinite),
            written.nonfinite[0],
        )
    manifest = attrs.evolve(draft, files=written.files, finite=not written.nonfinite)
    durable_files.write(work / NAME, manifest.to_json())
    durable_files.sync_folder(work)
    return manifest


def _name(work: Path, target: Path) -> None:
    replaced = None
    if target.exists():  # a folder cannot be renamed over one that is not empty
        replaced = target.with_name(f"{OLD}{target.name}-{secrets.token_hex(4)}")
        # A kill before the next rename is undone by ``directory.recover`` at the next start.
        durable_files.rename(target, replaced)
    try:
        durable_files.rename(work, target)
    except OSError:
        if replaced is not None:
            durable_files.rename(replaced, target)
        raise
    durable_files.sync_folder(target.parent)
    if replaced is not None:
        # After the sync: a power cut must leave the old checkpoint or the new one.
        remove_leftover(replaced)
