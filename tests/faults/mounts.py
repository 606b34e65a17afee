"""Real disks that are small or become read-only, seen by one process alone; each function makes one.

Where mounting is not permitted, the file layer raises the errors instead.
"""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import layer

from fundamentallm import cli
from fundamentallm_checkpoint.storage import durable_files

_NEWNS, _NEWUSER, _PRIVATE = 0x20000, 0x10000000, 0x44000
_RDONLY, _REMOUNT, _BIND = 0x1, 0x20, 0x1000
_OVERRIDES = 0b111110  # chown, what overrides permissions, and ownership
_libc = ctypes.CDLL(None, use_errno=True)


def unshare() -> bool:
    """Give this process mounts of its own; False where that is not allowed."""
    uid = os.getuid()
    if _libc.unshare(_NEWNS):
        if _libc.unshare(_NEWNS | _NEWUSER):
            return False
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    return not _libc.mount(None, b"/", None, _PRIVATE, None)


def _try() -> None:
    allowed = unshare() and not _libc.mount(b"none", b"/proc", b"tmpfs", 0, b"size=4k")
    os._exit(0 if allowed else 1)


def allowed() -> bool:
    """Whether a process here may mount."""
    child = multiprocessing.get_context("fork").Process(target=_try)
    child.start()
    child.join()
    return child.exitcode == 0


def small_disk(place: Path, copied: Path) -> None:
    """Mount a disk of 8 MB in memory, and copy in the end what is on it."""
    main = cli.main
    place.mkdir(parents=True)

    def copying() -> None:
        try:
            main()
        finally:
            shutil.copytree(place, copied)

    cli.main = copying
    if not unshare() or _libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, b"size=8m"):
        layer.quota(8_000_000)


def read_only(place: Path, step: int, call: str) -> None:
    """Mount a folder read-only in the midst of the save of a step, at its first call of a name."""
    place.mkdir(parents=True)
    path = os.fsencode(place)
    if not unshare() or _libc.mount(path, path, None, _BIND, None):
        layer.gone_at(step, errno.EROFS, call=call)
        return
    calls, done = layer.Within(step), []

    def before(_: int, name: str, words: tuple[Any, ...]) -> None:
        if calls.count(name, words) > 1 and name == call and not done:
            refused = _libc.mount(path, path, None, _BIND | _REMOUNT | _RDONLY, None)
            done.append(True)
            print("mounted read-only:", not refused, flush=True)

    durable_files.system = layer.Layer(before)


def obey_permissions() -> None:
    """Give up the capabilities that let root write everywhere."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()
    _libc.capget(header, held)
    held[0] &= ~_OVERRIDES
    assert not _libc.capset(header, held), os.strerror(ctypes.get_errno())
