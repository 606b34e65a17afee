"""The file layer of checkpoints with something wrong in it: each function here installs one.

``files.system`` is what every system call of a save goes through. What is installed in a process
that is about to train, the saves of that process meet.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import pickle
import shutil
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm import cli
from fundamentallm_checkpoint import files, publication

if TYPE_CHECKING:
    from collections.abc import Callable


class Layer:
    """The system calls, each of which ``before`` sees first: its number, its name, its words."""

    def __init__(self, before: Callable[[int, str, tuple[Any, ...]], None]) -> None:
        self.before = before
        self.numbers = itertools.count(1)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(files.System, name)

        def made(*words: Any) -> Any:
            if name != "close":  # what a close tells, fsync has told before
                self.before(next(self.numbers), name, words)
            return call(*words)

        return made


def kill_at(number: int, *, torn: bool = False) -> None:
    """Kill the process before its system call of that number; ``torn``: in the middle of it, if it
    is one that writes."""

    def before(now: int, name: str, words: tuple[Any, ...]) -> None:
        if now == number:
            if torn and name == "write":
                os.write(words[0], bytes(words[1])[: len(words[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    files.system = Layer(before)


def kill_at_renames(count: int) -> None:
    """Kill the process before it gives a checkpoint its name for the ``count``-th time."""
    renames = itertools.count(1)

    def before(_: int, name: str, words: tuple[Any, ...]) -> None:
        named = name == "rename" and Path(words[1]).name.startswith("step-")
        if named and next(renames) == count:
            os.kill(os.getpid(), signal.SIGKILL)

    files.system = Layer(before)


def signal_in_save(step: int, number: int, after: int) -> None:
    """Send the process a signal while it saves a step, so many system calls after the first."""
    calls = Within(step)

    def before(_: int, name: str, words: tuple[Any, ...]) -> None:
        if calls.count(name, words) == after:
            os.kill(os.getpid(), number)

    files.system = Layer(before)


class Within:
    """Counts the system calls of the save of one step: the first makes its folder."""

    def __init__(self, step: int) -> None:
        self.folder = f".tmp-{step:08d}-"
        self.thread: int | None = None
        self.numbers = itertools.count(1)

    def count(self, name: str, words: tuple[Any, ...]) -> int:
        """Return which of them this call is; 0 if it is none."""
        if name == "mkdir" and Path(words[0]).name.startswith(self.folder):
            self.thread = threading.get_ident()
        return next(self.numbers) if self.thread == threading.get_ident() else 0


def refuse(step: int, number: int, error: int) -> None:
    """Refuse the system call of that number in the save of a step; note what it was on stdout."""
    calls = Within(step)

    def before(_: int, name: str, words: tuple[Any, ...]) -> None:
        if calls.count(name, words) == number:
            print("refused:", name, flush=True)
            raise OSError(error, os.strerror(error), *map(str, _paths(words)[:1]))

    files.system = Layer(before)


def quota(size: int) -> None:
    """Be a disk of so many bytes that says it had room: the write that is too much is refused,
    after a part of it."""
    left = [size]

    def before(_: int, name: str, words: tuple[Any, ...]) -> None:
        if name == "write":
            left[0] -= len(words[1])
            if left[0] < 0:
                os.write(words[0], bytes(words[1])[: left[0]])
                raise OSError(28, os.strerror(28))
        if name == "unlink":
            left[0] += Path(words[0]).stat().st_size

    files.system = Layer(before)


def gone_at(step: int, error: int, *, call: str) -> None:
    """From the save of a step on refuse every call of a name, as a disk that was pulled or mounted
    read-only does."""
    calls = Within(step)
    broken: list[bool] = []

    def before(_: int, name: str, words: tuple[Any, ...]) -> None:
        if calls.count(name, words):
            broken.append(True)
        if broken and name == call:
            raise OSError(error, os.strerror(error), *map(str, _paths(words)[:1]))

    files.system = Layer(before)


_NEWNS, _NEWUSER, _PRIVATE = 0x20000, 0x10000000, 0x44000


def small_disk(place: Path, copied: Path) -> None:
    """Mount a disk of 8 MB, in memory, that only this process sees, and copy in the end what is on
    it. Where nobody may mount, the system calls count the bytes in its stead."""
    main = cli.main
    place.mkdir(parents=True)

    def copying() -> None:
        try:
            main()
        finally:
            shutil.copytree(place, copied)

    cli.main = copying
    libc, uid = ctypes.CDLL(None, use_errno=True), os.getuid()
    if libc.unshare(_NEWNS):
        if libc.unshare(_NEWNS | _NEWUSER):
            quota(8_000_000)
            return
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    mounted = libc.mount(None, b"/", None, _PRIVATE, None) or libc.mount(
        b"none", str(place).encode(), b"tmpfs", 0, b"size=8m")  # fmt: skip
    if mounted:
        quota(8_000_000)


class Recorder:
    """The system calls, each noted with all that it needs to be made again, by paths."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.paths: dict[int, str] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(files.System, name)

        def made(*words: Any) -> Any:
            known = [self.paths[word] if isinstance(word, int) and n == 0 else word
                     for n, word in enumerate(words)]  # fmt: skip
            noted = [str(word) if isinstance(word, Path) else word for word in known]
            noted = [bytes(word) if isinstance(word, memoryview) else word for word in noted]
            answer = call(*words)
            if name == "open":
                self.paths[answer] = str(words[0])
            self.calls.append((name, *noted))
            return answer

        return made


def record(target: Path) -> None:
    """Write all system calls of the run's saves to a file at its end, and where a save returned."""
    recorder = files.system = Recorder()
    publish = publication.publish

    def published(*words: Any, **more: Any) -> Path:
        folder = publish(*words, **more)
        recorder.calls.append(("published", str(folder)))
        target.write_bytes(pickle.dumps(recorder.calls))
        return folder

    publication.publish = published


def _paths(words: tuple[Any, ...]) -> list[Path]:
    return [word for word in words if isinstance(word, Path)]
