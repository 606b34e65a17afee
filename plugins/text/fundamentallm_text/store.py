"""What was worked out once, kept on disk: by what it was made of, whole or not there at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from fundamentallm import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    Tokens: TypeAlias = NDArray[Any]

log = logging.getLogger("fundamentallm")

FORMAT = 1
HEADER = 4096
BLOCK = 1 << 20
LARGE = 1 << 26
SETTLED = 2_000_000_000


@dataclass(frozen=True)
class Stored:
    """Tokens on disk: a memory map, and the sha256 of their bytes."""

    tokens: Tokens
    digest: str


class DamagedError(Exception):
    """A file of the store is not what was written."""


class Store:
    """A folder of derived files. A name in it exists only for complete, durable content.

    Every file begins with a header that holds the checksum of the rest; what does not agree with
    it counts as not there, and is made again. Any number of processes may share the folder.
    """

    def __init__(
        self, folder: Path | None = None, large: int = LARGE, settled: int = SETTLED
    ) -> None:
        self.large = large
        self.settled = settled
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = folder or cache / "fundamentallm" / "text"

    def tokens(self, key: str, dtype: str, make: Callable[[], Iterable[Tokens]]) -> Stored:
        """Return the tokens kept under a key; if there are none, write what ``make`` yields."""
        path = self.folder / f"{key}.tokens"
        with self._guarded(path):
            with suppress(FileNotFoundError, DamagedError):
                return self._open(path)
            with self._locked(path):
                try:
                    return self._open(path)  # another process may have made it meanwhile
                except FileNotFoundError:
                    pass
                except DamagedError as error:
                    log.warning("%s is damaged (%s): it is made again", path, error)
                return self._write(path, dtype, make())

    def text(self, key: str, make: Callable[[], str]) -> str:
        """Return the text kept under a key; if there is none, keep what ``make`` returns."""
        kept = self.tokens(key, "uint8", lambda: [np.frombuffer(make().encode(), np.uint8)])
        return kept.tokens.tobytes().decode()

    def digest(self, path: Path, skip: int = 0) -> str:
        """Return the sha256 of a file from byte ``skip`` on.

        That of a file of ``large`` bytes is remembered for as long as its size, times and inode
        stay the same; but not if it was touched less than ``settled`` nanoseconds before, when
        the clock of the file system might not tell a second change from the first.
        """
        stamp = stamp_of(path)
        note = self.folder / f"{_sha256(os.fsencode(path.absolute()))}.sum"
        if stamp["size"] >= self.large:
            with suppress(OSError, ValueError, KeyError, TypeError):
                kept = json.loads(note.read_text())
                if kept["stamp"] == stamp and kept["skip"] == skip:
                    return str(kept["sha256"])
        began = time.time_ns()
        with path.open("rb") as file:
            file.seek(skip)
            found = hashlib.file_digest(file, "sha256").hexdigest()
        settled = began - max(stamp["mtime"], stamp["ctime"]) > self.settled
        if stamp["size"] >= self.large and settled and stamp == stamp_of(path):
            with self._guarded(note):
                said = json.dumps({"stamp": stamp, "skip": skip, "sha256": found})
                write_whole(note, said, note.with_name(f"{note.name}.{secrets.token_hex(4)}.tmp"))
        return found

    def _open(self, path: Path) -> Stored:
        header = _read_header(path)
        dtype, count = np.dtype(header["dtype"]), int(header["count"])
        if path.stat().st_size != HEADER + count * dtype.itemsize:
            raise DamagedError("its size is wrong")
        if self.digest(path, skip=HEADER) != header["sha256"]:
            raise DamagedError("its content has changed")
        return Stored(mapped(path, dtype, HEADER, count), header["sha256"])

    def _write(self, path: Path, dtype: str, arrays: Iterable[Tokens]) -> Stored:
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        for left in path.parent.glob(f"{path.name}.*.tmp"):
            left.unlink(missing_ok=True)  # of a process that died: this one holds the lock
        try:
            with temporary.open("wb") as file:
                header = _write_body(file, np.dtype(dtype), arrays)
                file.seek(0)
                file.write(header)
                _sync(file)
            _publish(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        known = json.loads(header[64:])
        return Stored(mapped(path, np.dtype(dtype), HEADER, known["count"]), known["sha256"])

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Let one process at a time make a file. The lock is gone with the process."""
        with path.with_name(f"{path.name}.lock").open("ab") as file:
            # Where the file system knows no locks, two processes make the same file twice.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _guarded(self, path: Path) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            why = error.strerror or error
            raise StorageError(
                f"cannot keep {path}: {why}; text.cache_dir names another folder"
            ) from error


def mapped(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> Tokens:
    """Return ``count`` items of a file as a read-only memory map, as a plain array."""
    if not count:
        return np.empty(0, dtype=dtype)
    # A plain array is several times quicker to index than the subclass.
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)


def stamp_of(path: Path) -> dict[str, int]:
    """Return what changes when a file does, as far as the file system tells."""
    s = path.stat()
    return {"size": s.st_size, "mtime": s.st_mtime_ns, "ctime": s.st_ctime_ns, "inode": s.st_ino}


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        head = file.read(HEADER)
    if len(head) < HEADER or head[:64] != _sha256(head[64:]).encode():
        raise DamagedError("its header is not whole")
    header: dict[str, Any] = json.loads(head[64:])
    if header["format"] != FORMAT:
        raise DamagedError(f"its format is {header['format']}, not {FORMAT}")
    return header


def _write_body(file: BinaryIO, dtype: np.dtype[Any], arrays: Iterable[Tokens]) -> bytes:
    file.write(bytes(HEADER))
    digest, count = hashlib.sha256(), 0
    for array in arrays:
        data = np.ascontiguousarray(array, dtype=dtype).data
        digest.update(data)
        file.write(data)
        count += len(array)
    header = {"format": FORMAT, "dtype": dtype.name, "count": count, "sha256": digest.hexdigest()}
    rest = b"\n" + json.dumps(header).encode().ljust(HEADER - 65)
    return _sha256(rest).encode() + rest


def _publish(temporary: Path, path: Path) -> None:
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, text: str, temporary: Path) -> None:
    """Write a text file so that it is there in whole and on disk, or is what it was before.

    ``temporary`` is a name beside it, which no other process uses.
    """
    with temporary.open("wb") as file:
        file.write(text.encode())
        _sync(file)
    _publish(temporary, path)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
