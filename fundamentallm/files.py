"""Durable files: a name exists only for content that is complete and on disk."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fundamentallm.errors import StorageError


@contextlib.contextmanager
def durable_file(path: Path, draft: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file to write that replaces ``path`` when the block ends, complete and synced.

    The content goes to a hidden file in the same folder, is fsynced, renamed, and the folder is
    fsynced. If the block raises, ``path`` stays what it was. Two processes must not write the same
    path at once, unless each names another hidden file in the same folder as its ``draft``. Raises
    ``StorageError`` where the file system refuses.
    """
    part = draft or path.with_name(f".{path.name}.part")
    try:
        try:
            # A draft that a killed process has left is overwritten.
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            # Only after the fsync: a power cut could otherwise leave the name with no content.
            part.replace(path)
            sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_durably(path: Path, content: str | bytes, draft: Path | None = None) -> None:
    """Write a whole file durably (see ``durable_file``); a text is written as UTF-8."""
    with durable_file(path, draft) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def set_aside(path: Path, suffix: str = "") -> Path:
    """Rename a file or folder to ``<name>.before-<Unix time>``; return the new path.

    A ``suffix`` that the name ends in stays its end. No file that exists is replaced.
    """
    when = int(time.time())
    name = path.name.removesuffix(suffix)
    while (renamed := path.with_name(f"{name}.before-{when}{suffix}")).exists():
        when += 1
    path.rename(renamed)
    sync_folder(path.parent)
    return renamed


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; file systems that cannot sync folders are left alone."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)
