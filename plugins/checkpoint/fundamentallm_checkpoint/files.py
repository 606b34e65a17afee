"""The files of checkpoints: every system call of a save is made here, through ``system``.

What a disk can refuse is refused here: every error is an ``OSError`` that names its file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHUNK = 8 * 2**20
"""Bytes that are hashed, then written: they are still in the processor's cache in between."""

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# 0o666: the umask decides, as for any other file the user's programs write.
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class System:
    """The system calls that change what is on the disk, or wait for it, and what asks its space.

    Whoever wants to see, fail or cut them puts another object in the place of ``files.system``.
    """

    open = staticmethod(os.open)
    write = staticmethod(os.write)
    fsync = staticmethod(os.fsync)
    close = staticmethod(os.close)
    mkdir = staticmethod(os.mkdir)
    rename = staticmethod(os.rename)
    unlink = staticmethod(os.unlink)
    rmdir = staticmethod(os.rmdir)
    flock = staticmethod(fcntl.flock)
    statvfs = staticmethod(os.statvfs)


system: Any = System()


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
        self._file = system.open(path, _NEW, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        """Append all of ``data``."""
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            self._hash.update(part)
            self._size += len(part)
            with _naming(self.path):
                while part:
                    part = part[system.write(self._file, part) :]

    def seal(self) -> Seal:
        """Wait until the file is on the disk, and tell what it holds."""
        with _naming(self.path):
            system.fsync(self._file)
        return Seal(self._size, self._hash.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with _naming(self.path):
            system.close(self._file)


class Source:
    """A regular file that is hashed while it is read; never a link, and nothing that blocks."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, _READ)
        found = os.fstat(self._file)
        if not stat.S_ISREG(found.st_mode):
            os.close(self._file)
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        self.path = path
        self.size = found.st_size
        self._read = 0
        self._hash = hashlib.sha256()

    def fill(self, view: memoryview) -> None:
        """Read as many bytes as ``view`` holds into it; ``ValueError`` if the file ends before."""
        while view:
            with _naming(self.path):
                count = os.readv(self._file, [view[:CHUNK]])
            if not count:
                raise ValueError("ends too early")
            self._hash.update(view[:count])
            self._read += count
            view = view[count:]

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes; ``ValueError`` if the file ends before."""
        if size > self.size - self._read:  # before that much memory is taken
            raise ValueError("ends too early")
        data = bytearray(size)
        self.fill(memoryview(data))
        return bytes(data)

    def seal(self) -> Seal:
        """Read what is left, and tell what the file holds."""
        buffer = memoryview(bytearray(min(CHUNK, max(self.size - self._read, 1))))
        with _naming(self.path):
            while count := os.readv(self._file, [buffer]):
                self._hash.update(buffer[:count])
                self._read += count
        return Seal(self._read, self._hash.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def write(path: Path, data: bytes) -> Seal:
    """Write a new file and wait until it is on the disk."""
    with Sink(path) as sink:
        sink.write(data)
        return sink.seal()


def read(path: Path, limit: int) -> bytes:
    """Return what a regular file holds; raise ``ValueError`` if that is more than ``limit``."""
    with Source(path) as source:
        if source.size > limit:
            raise ValueError(f"is larger than {limit:,} bytes")
        return source.take(source.size)


def measure(path: Path) -> Seal:
    """Read a regular file through."""
    with Source(path) as source:
        return source.seal()


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, each one durable."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        system.mkdir(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    file = system.open(path, _FOLDER)
    try:
        with _naming(path):
            system.fsync(file)
    except OSError as error:
        # A file system that syncs no folders does the best it can.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        system.close(file)


def rename(path: Path, target: Path) -> None:
    """Give a folder or file another name; the folder above has yet to be synced."""
    system.rename(path, target)


def remove(path: Path) -> None:
    """Delete a file or link, or a folder and all in it; no link is followed."""
    if path.is_symlink() or not path.is_dir():
        system.unlink(path)
        return
    for inner in list(path.iterdir()):
        remove(inner)
    system.rmdir(path)


def free(path: Path) -> int | None:
    """Return the bytes that may still be written below a folder; None if nobody can tell."""
    with _naming(path):
        found = system.statvfs(path)
    return found.f_bavail * found.f_frsize if found.f_blocks else None


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Hold a new folder as this process's own until the block ends or the process dies."""
    system.mkdir(path)
    file = system.open(path, _FOLDER)
    try:
        with _naming(path):
            system.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        system.close(file)


def is_claimed(path: Path) -> bool:
    """Whether a living process holds the folder, or nobody can tell."""
    try:
        file = os.open(path, _FOLDER)
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
