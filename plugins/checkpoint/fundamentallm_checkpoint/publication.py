"""How a checkpoint comes to be: complete and durable before it has its name."""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
from typing import TYPE_CHECKING

import attrs

from fundamentallm import StorageError
from fundamentallm_checkpoint import contents, files
from fundamentallm_checkpoint.leftovers import OLD, TMP, remove_leftover
from fundamentallm_checkpoint.manifest import NAME, folder_name, owner

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm_checkpoint.contents import Packed, Report
    from fundamentallm_checkpoint.manifest import Manifest

_MARGIN = 2**16

log = logging.getLogger("fundamentallm")


class NotSavedError(StorageError):
    """The disk refused a checkpoint; what was saved before is as it was."""


def publish(home: Path, packed: Packed, draft: Manifest, report: Report | None = None) -> Path:
    """Write a checkpoint under ``home`` and return its folder, once that survives a power cut.

    The order is the promise: every file durable, the manifest last, then the folder, then its
    name. A failure before the name leaves no trace, and raises ``NotSavedError`` if it is the
    disk's. The run's own checkpoint of the same step gives way to the new one; that of another run
    is a ``StorageError``.
    """
    target = home / folder_name(draft.step)
    work = home / f"{TMP}{draft.step:08d}-{secrets.token_hex(4)}"
    if owner(target) not in (None, draft.run):
        raise StorageError(
            f"{target} is a checkpoint of another run and is not overwritten: move it away"
        )
    try:
        files.make_folder(home)
        check_space(home, packed.size)
        with files.claimed(work):
            _fill(work, packed, draft, report)
            _name(work, target)
    except OSError as error:
        state = "are untouched" if home.is_dir() else "were deleted, by whomever"
        raise NotSavedError(
            f"the checkpoint of step {draft.step} could not be saved: {error.filename}:"
            f" {error.strerror}. Earlier checkpoints in {home} {state}."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            if work.exists():
                files.remove(work)
    return target


def check_space(home: Path, size: int) -> None:
    """Raise ``OSError`` if a folder's disk has no room for a checkpoint of so many bytes."""
    free, needed = files.free(home), size + size // 100 + _MARGIN
    if free is not None and free < needed:
        said = f"No space left on device: {needed:,} bytes are needed, and {free:,} are free"
        raise OSError(errno.ENOSPC, said, str(home))


def probe(home: Path) -> None:
    """See that a folder takes files; raise ``OSError`` if it does not."""
    work = home / f"{TMP}probe-{secrets.token_hex(4)}"
    try:
        with files.claimed(work):
            files.write(work / NAME, b"{}\n")
    finally:
        if work.exists():
            files.remove(work)


def _fill(work: Path, packed: Packed, draft: Manifest, report: Report | None) -> None:
    written = contents.write(work, packed, report)
    if written.poisoned:
        log.warning(
            "step %d: %d of the saved tensors hold NaN or infinity, among them %s",
            draft.step,
            len(written.poisoned),
            written.poisoned[0],
        )
    manifest = attrs.evolve(draft, files=written.files, finite=not written.poisoned)
    files.write(work / NAME, manifest.to_json())
    files.sync_folder(work)


def _name(work: Path, target: Path) -> None:
    replaced = None
    if target.exists():  # a folder cannot be renamed over another one that holds something
        replaced = target.with_name(f"{OLD}{target.name}-{secrets.token_hex(4)}")
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
