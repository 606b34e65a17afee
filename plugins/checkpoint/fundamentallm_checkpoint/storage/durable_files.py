"""Files that are written once, hashed and fsynced; what changes the disk goes through ``system``.

Every error is an ``OSError`` that names its file.
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

# A chunk is hashed and then written while it is still in the processor's cache.
CHUNK = 8 * 2**20
"""Bytes that are hashed, read or written at a time."""

# O_NOFOLLOW: a link could lead out of the checkpoint. O_NONBLOCK: opening a FIFO would wait.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
# The umask decides, as for every other file that the user's programs write.
_MODE = 0o666


class System:
    """The system calls that change the disk, wait for it, or ask for its free space.

    Tests that watch, fail or cut these calls replace ``durable_files.system``. That is why this
    module does not use ``fundamentallm.durable_file`` and ``sync_folder``: what goes past
    ``system`` cannot be made to fail, and the model of a power cut would not see it.
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
class FileDigest:
    """Size and SHA-256 of a file."""

    size: int
    sha256: str


class HashingWriter:
    """A new file that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = 0
        self._hash = hashlib.sha256()
        self._file = system.open(path, _NEW, _MODE)

    def write(self, data: bytes | memoryview) -> None:
        """Append all of ``data``."""
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            self._hash.update(part)
            self._size += len(part)
            with _with_path(self.path):
                while part:  # a write may take less than it is given
                    part = part[system.write(self._file, part) :]

    def sync(self) -> FileDigest:
        """Fsync the file and return its digest."""
        with _with_path(self.path):
            system.fsync(self._file)
        return FileDigest(self._size, self._hash.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with _with_path(self.path):
            system.close(self._file)


class HashingReader:
    """A regular file that is hashed while it is read; links and FIFOs are refused."""

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
        """Read ``len(view)`` bytes into ``view``; raise ``ValueError`` if the file ends before."""
        while view:
            with _with_path(self.path):
                count = os.readv(self._file, [view[:CHUNK]])
            if not count:
                raise ValueError("ends too early")
            self._hash.update(view[:count])
            self._read += count
            view = view[count:]

    def take(self, size: int) -> bytes:
        """Return the next ``size`` bytes; raise ``ValueError`` if the file ends before."""
        if size > self.size - self._read:  # checked before the memory is allocated
            raise ValueError("ends too early")
        data = bytearray(size)
        self.fill(memoryview(data))
        return bytes(data)

    def digest(self) -> FileDigest:
        """Read the rest of the file and return the digest of all of it."""
        buffer = memoryview(bytearray(min(CHUNK, max(self.size - self._read, 1))))
        with _with_path(self.path):
            while count := os.readv(self._file, [buffer]):
                self._hash.update(buffer[:count])
                self._read += count
        return FileDigest(self._read, self._hash.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def write(path: Path, data: bytes) -> FileDigest:
    """Write and fsync a new file. Its name is durable once the folder is synced."""
    with HashingWriter(path) as file:
        file.write(data)
        return file.sync()


def replace(path: Path, data: bytes) -> None:
    """Write a small file durably under ``path``, replacing what is there in one step."""
    part = path.with_name(f".{path.name}")
    part.unlink(missing_ok=True)  # left by a process that was killed here
    # Synced before the rename: else a power cut could leave the name without the content.
    write(part, data)
    rename(part, path)
    sync_folder(path.parent)


def read(path: Path, limit: int) -> bytes:
    """Return the content of a regular file; raise ``ValueError`` if it is larger than ``limit``."""
    with HashingReader(path) as file:
        if file.size > limit:
            raise ValueError(f"is larger than {limit:,} bytes")
        return file.take(file.size)


def digest(path: Path) -> FileDigest:
    """Read a regular file and return its digest."""
    with HashingReader(path) as file:
        return file.digest()


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, each of them durable."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        system.mkdir(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Fsync a folder: the names in it are then durable."""
    file = system.open(path, _FOLDER)
    try:
        with _with_path(path):
            system.fsync(file)
    except OSError as error:
        # Some file systems cannot sync folders; there is nothing more to do on these.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        system.close(file)


def rename(path: Path, target: Path) -> None:
    """Rename a file or folder. The new name is durable once the parent folder is synced."""
    system.rename(path, target)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with its content; links are not followed."""
    if path.is_symlink() or not path.is_dir():
        system.unlink(path)
        return
    for inner in list(path.iterdir()):
        remove(inner)
    system.rmdir(path)


def free_space(path: Path) -> int | None:
    """Return the bytes that may still be written below a folder; None if the disk reports none."""
    with _with_path(path):
        found = system.statvfs(path)
    return found.f_bavail * found.f_frsize if found.f_blocks else None


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Make a folder and lock it until the block ends or the process dies."""
    system.mkdir(path)
    file = system.open(path, _FOLDER)
    try:
        with _with_path(path):
            system.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        system.close(file)


def is_locked(path: Path) -> bool:
    """Return whether a living process has locked the folder, or it cannot be known."""
    try:
        file = os.open(path, _FOLDER)
    except OSError:
        # If in doubt, it is locked: folders that are not locked are deleted.
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
def _with_path(path: Path) -> Iterator[None]:
    """Add the path to errors of calls that know only a file descriptor."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
