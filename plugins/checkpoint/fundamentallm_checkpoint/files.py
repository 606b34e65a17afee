"""The file operations of a save, all of them here: what a disk can refuse is refused here.

Every error is an ``OSError`` that names its file.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHUNK = 8 * 2**20
"""Bytes that are hashed, then written: they are still in the processor's cache in between."""


@attrs.frozen
class Seal:
    """What a file must hold, byte for byte."""

    size: int
    sha256: str


class Sink:
    """A new file that counts and hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = 0
        self._hash = hashlib.sha256()
        # 0o666: the umask decides, as for any other file the user's programs write.
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        """Append all of ``data``."""
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            self._hash.update(part)
            self._size += len(part)
            with _naming(self.path):
                while part:
                    part = part[os.write(self._file, part) :]

    def seal(self) -> Seal:
        """Wait until the file is on the disk, and tell what it holds."""
        with _naming(self.path):
            os.fsync(self._file)
        return Seal(self._size, self._hash.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def write(path: Path, data: bytes) -> Seal:
    """Write a new file and wait until it is on the disk."""
    with Sink(path) as sink:
        sink.write(data)
        return sink.seal()


def measure(path: Path) -> Seal:
    """Read a regular file through; raise ``OSError`` for a link or anything else."""
    found = hashlib.sha256()
    size = 0
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(file, "rb", buffering=0) as stream, _naming(path):
        while part := stream.read(CHUNK):
            found.update(part)
            size += len(part)
    return Seal(size, found.hexdigest())


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, each one durable."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _naming(path):
            os.fsync(file)
    finally:
        os.close(file)


def rename(path: Path, target: Path) -> None:
    """Give a folder another name; the folder above has yet to be synced."""
    path.rename(target)


def remove(path: Path) -> None:
    """Delete a folder and all in it."""
    shutil.rmtree(path)


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold a new folder as this process's own until the block ends or the process dies."""
    path.mkdir()
    file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _naming(path):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def is_claimed(path: Path) -> bool:
    """Whether a living process holds the folder, or nobody can tell."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(file)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add to an error of an open file which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
