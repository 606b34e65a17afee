"""A cache on disk for tokens and tokenizers, with keys that are hashes of their sources."""

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

from fundamentallm import StorageError, durable_file, write_durably

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    Tokens: TypeAlias = NDArray[Any]

log = logging.getLogger("fundamentallm")

ADVICE = "set text.cache_dir to use another folder"

FORMAT = 1
HEADER = 4096
"""Bytes of the header of a cache file."""
LARGE = 1 << 26
"""Files of at least this many bytes have their checksum remembered."""
SETTLED = 2_000_000_000
"""Nanoseconds after which a second change of a file certainly has another time stamp."""


@dataclass(frozen=True)
class CachedTokens:
    """Tokens on disk: a memory map, and the SHA-256 of their bytes."""

    tokens: Tokens
    digest: str


class DamagedFileError(Exception):
    """A file of the cache does not match its checksum."""


class TokenCache:
    """A folder of derived files. A name in it exists only for complete, durable content.

    Every file begins with a header that contains the checksum of the rest. A damaged file counts as
    missing and is made again. Any number of processes may share the folder.
    """

    def __init__(
        self, folder: Path | None = None, large: int = LARGE, settled: int = SETTLED
    ) -> None:
        self.large = large
        self.settled = settled
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = folder or cache / "fundamentallm" / "text"

    def tokens(self, key: str, dtype: str, make: Callable[[], Iterable[Tokens]]) -> CachedTokens:
        """Return the tokens of a key; if there are none, write what ``make`` yields."""
        path = self.folder / f"{key}.tokens"
        with self._guarded(path):
            with suppress(FileNotFoundError, DamagedFileError):
                return self._open(path)
            with self._locked(path):
                try:
                    return self._open(path)  # another process may have made it in the meantime
                except FileNotFoundError:
                    pass
                except DamagedFileError as error:
                    log.warning("%s is damaged (%s) and will be made again", path, error)
                return self._write(path, dtype, make())

    def text(self, key: str, make: Callable[[], str]) -> str:
        """Return the text of a key; if there is none, write what ``make`` returns."""
        stored = self.tokens(key, "uint8", lambda: [np.frombuffer(make().encode(), np.uint8)])
        return stored.tokens.tobytes().decode()

    def digest(self, path: Path, skip: int = 0) -> str:
        """Return the SHA-256 of a file from byte ``skip`` on.

        For a file of ``large`` bytes or more the result is remembered until its size, times or
        inode change. It is not remembered if the file was changed less than ``settled`` nanoseconds
        before, because a second change could then have the same time stamp.
        """
        stamp = file_stamp(path)
        note = self.folder / f"{_sha256(os.fsencode(path.absolute()))}.sum"
        if stamp["size"] >= self.large:
            with suppress(OSError, ValueError, KeyError, TypeError):
                known = json.loads(note.read_text())
                if known["stamp"] == stamp and known["skip"] == skip:
                    return str(known["sha256"])
        began = time.time_ns()
        with path.open("rb") as file:
            file.seek(skip)
            found = hashlib.file_digest(file, "sha256").hexdigest()
        settled = began - max(stamp["mtime"], stamp["ctime"]) > self.settled
        if stamp["size"] >= self.large and settled and stamp == file_stamp(path):
            with self._guarded(note):
                facts = {"stamp": stamp, "skip": skip, "sha256": found}
                write_durably(note, json.dumps(facts), _draft(note))
        return found

    def _open(self, path: Path) -> CachedTokens:
        header = _read_header(path)
        dtype, count = np.dtype(header["dtype"]), int(header["count"])
        if path.stat().st_size != HEADER + count * dtype.itemsize:
            raise DamagedFileError("its size is wrong")
        if self.digest(path, skip=HEADER) != header["sha256"]:
            raise DamagedFileError("its content has changed")
        return CachedTokens(map_tokens(path, dtype, HEADER, count), header["sha256"])

    def _write(self, path: Path, dtype: str, arrays: Iterable[Tokens]) -> CachedTokens:
        for draft in path.parent.glob(f"{path.name}.*.tmp"):
            draft.unlink(missing_ok=True)  # of a process that was killed: this one has the lock
        with durable_file(path, _draft(path)) as file:
            header = _write_body(file, np.dtype(dtype), arrays)
            file.seek(0)
            file.write(header)
        known = json.loads(header[64:])
        return CachedTokens(
            map_tokens(path, np.dtype(dtype), HEADER, known["count"]), known["sha256"]
        )

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        """Let one process at a time make a file. The lock ends with the process."""
        with path.with_name(f"{path.name}.lock").open("ab") as file:
            # On a file system without locks, two processes may make the same file.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _guarded(self, path: Path) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror or error}; {ADVICE}") from error
        except StorageError as error:
            raise StorageError(f"{error}; {ADVICE}") from error


def map_tokens(path: Path, dtype: np.dtype[Any], offset: int, count: int) -> Tokens:
    """Return ``count`` items of a file from byte ``offset`` on as a read-only memory map."""
    if not count:
        return np.empty(0, dtype=dtype)
    # As a plain array, which is several times faster to index than np.memmap.
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)).view(np.ndarray)


def file_stamp(path: Path) -> dict[str, int]:
    """Return what the file system changes when a file changes: size, times (ns) and inode."""
    s = path.stat()
    return {"size": s.st_size, "mtime": s.st_mtime_ns, "ctime": s.st_ctime_ns, "inode": s.st_ino}


def _read_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        head = file.read(HEADER)
    if len(head) < HEADER or head[:64] != _sha256(head[64:]).encode():
        raise DamagedFileError("its header is damaged")
    header: dict[str, Any] = json.loads(head[64:])
    if header["format"] != FORMAT:
        raise DamagedFileError(f"its format is {header['format']}, not {FORMAT}")
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


def _draft(path: Path) -> Path:
    # A random name, because processes that share the folder may write the same file at once.
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
