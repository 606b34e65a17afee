"""The store: what is there is whole; what is not whole is made again."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from fundamentallm import StorageError
from fundamentallm_text.token_cache import HEADER, TokenCache

if TYPE_CHECKING:
    from fundamentallm_text.token_cache import Tokens

PARTS = [np.arange(5), np.arange(5, 1000)]


def _cached(store: TokenCache) -> Tokens:
    return store.tokens("numbers", "uint16", lambda: iter(PARTS)).tokens


def _never() -> Iterator[Tokens]:
    raise AssertionError("it was cached, and is made again")
    yield


def test_tokens_are_made_once_and_then_read_from_the_cache(tmp_path: Path) -> None:
    made = TokenCache(tmp_path).tokens("numbers", "uint16", lambda: iter(PARTS))
    read = TokenCache(tmp_path).tokens("numbers", "uint16", _never)
    assert made.tokens.tolist() == read.tokens.tolist() == list(range(1000))
    assert read.tokens.dtype == np.uint16
    assert made.digest == read.digest == hashlib.sha256(read.tokens.tobytes()).hexdigest()
    assert not read.tokens.flags.writeable


def test_an_empty_array_is_cached(tmp_path: Path) -> None:
    for make in (lambda: iter([]), _never):
        assert len(TokenCache(tmp_path).tokens("none", "uint16", make).tokens) == 0


def test_texts_are_cached(tmp_path: Path) -> None:
    assert TokenCache(tmp_path).text("words", lambda: "schön") == "schön"
    assert TokenCache(tmp_path).text("words", lambda: "other") == "schön"


@pytest.mark.parametrize("place", [0, 5, 64, 66, 100, HEADER - 1, HEADER, HEADER + 999, -1])
def test_a_flipped_byte_anywhere_is_detected_and_repaired(
    tmp_path: Path, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    _cached(TokenCache(tmp_path))
    path = tmp_path / "numbers.tokens"
    data = bytearray(path.read_bytes())
    sound = bytes(data)
    data[place] ^= 0x10
    path.write_bytes(data)
    assert _cached(TokenCache(tmp_path)).tolist() == list(range(1000))
    assert path.read_bytes() == sound
    assert "numbers.tokens is damaged" in caplog.text


@pytest.mark.parametrize("size", [0, 10, HEADER - 1, HEADER, HEADER + 1999, HEADER + 2001])
def test_a_changed_file_size_is_detected_and_repaired(tmp_path: Path, size: int) -> None:
    _cached(TokenCache(tmp_path))
    path = tmp_path / "numbers.tokens"
    os.truncate(path, size)
    assert _cached(TokenCache(tmp_path)).tolist() == list(range(1000))
    assert path.stat().st_size == HEADER + 2000


def _python(code: str, folder: Path) -> subprocess.Popen[bytes]:
    start = "import os, signal, sys, numpy as np; from pathlib import Path\n"
    start += "from fundamentallm_text.token_cache import TokenCache; store = TokenCache(Path(sys.argv[1]))\n"
    return subprocess.Popen([sys.executable, "-c", start + code, folder])


def test_a_killed_process_leaves_no_valid_file_and_its_draft_is_deleted(tmp_path: Path) -> None:
    dying = """def make():
    yield np.arange(500)
    os.kill(os.getpid(), signal.SIGKILL)
store.tokens("numbers", "uint16", make)"""
    assert _python(dying, tmp_path).wait(60) == -9
    assert list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob("*.tokens"))
    assert _cached(TokenCache(tmp_path)).tolist() == list(range(1000))
    assert not list(tmp_path.glob("*.tmp"))


def test_one_of_many_processes_makes_the_tokens_and_all_read_them(tmp_path: Path) -> None:
    slow = """import time
def make():
    with open(store.folder / "made", "a") as file:
        file.write("x")
    for i in range(10):
        yield np.arange(100 * i, 100 * i + 100)
        time.sleep(0.02)
assert store.tokens("numbers", "uint16", make).tokens.tolist() == list(range(1000))"""
    tmp_path.mkdir(exist_ok=True)
    started = [_python(slow, tmp_path) for _ in range(3)]
    assert [process.wait(60) for process in started] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "x"


def test_a_failure_while_making_tokens_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="made again"):
        TokenCache(tmp_path).tokens("numbers", "uint16", _never)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_full_disk_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    code = """import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from fundamentallm import StorageError
try:
    store.tokens("numbers", "uint16", lambda: [np.arange(1000)] * 100)
except StorageError as error:
    assert "text.cache_dir" in str(error) and "File too large" in str(error), error
    sys.exit([path.suffix for path in store.folder.iterdir()] != [".lock"])"""
    assert _python(code, tmp_path).wait(60) == 0


def test_a_folder_that_cannot_be_created_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"Not a directory; set text\.cache_dir"):
        _cached(TokenCache(tmp_path / "file" / "cache"))


def test_the_digest_of_a_large_file_is_remembered_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"one")
    store = TokenCache(tmp_path / "store", large=3, settled=-1)
    first = store.digest(path)
    assert first == hashlib.sha256(b"one").hexdigest()
    (note,) = store.folder.glob("*.sum")
    note.write_text(note.read_text().replace(first, "remembered"))
    assert store.digest(path) == "remembered"
    assert store.digest(path, skip=1) == hashlib.sha256(b"ne").hexdigest()
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert store.digest(path) == hashlib.sha256(b"two").hexdigest()


def test_the_digest_of_a_file_just_written_or_small_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "fresh"
    path.write_bytes(b"one")
    for store in (
        TokenCache(tmp_path / "a", large=3),
        TokenCache(tmp_path / "b", large=4, settled=-1),
    ):
        store.digest(path)
        assert not list(tmp_path.glob("*/*.sum"))
    assert time.time_ns() > path.stat().st_mtime_ns


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"stamp": 1}', "\x00"])
def test_a_damaged_checksum_file_is_ignored(tmp_path: Path, note: str) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"one")
    store = TokenCache(tmp_path / "store", large=3, settled=-1)
    kept = store.digest(path)
    next(store.folder.glob("*.sum")).write_text(note)
    assert store.digest(path) == kept


def test_the_folder_is_in_the_users_cache_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert TokenCache().folder == tmp_path / "xdg" / "fundamentallm" / "text"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TokenCache().folder == tmp_path / ".cache" / "fundamentallm" / "text"
