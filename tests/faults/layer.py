"""The file layer of checkpoints with something wrong in it: each function here installs one.

``durable_files.system`` is what every system call of a save goes through. What is installed in a process
that is about to train, the saves of that process meet. Some act in the loop in its stead: before a
hook, or when a task reports its progress.
"""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm import launch
from fundamentallm_checkpoint.storage import directory, durable_files, publish
from fundamentallm_checkpoint.storage.manifest import folder_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from fundamentallm.run import Run
    from fundamentallm_checkpoint.storage.manifest import Manifest

    Act: TypeAlias = Callable[[], object]


class Layer:
    """The system calls, each of which ``before`` sees first: its number, its name, its words."""

    def __init__(self, before: Callable[[int, str, tuple[Any, ...]], None]) -> None:
        self.before = before
        self.numbers = itertools.count(1)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(durable_files.System, name)

        def made(*words: Any) -> Any:
            if name != "close":  # fsync has reported the errors of close before
                self.before(next(self.numbers), name, words)
            return call(*words)

        return made


def kill() -> None:
    """Die as by ``kill -9``."""
    os.kill(os.getpid(), signal.SIGKILL)


def send(number: int) -> None:
    """Send this process a signal, and note on stdout between which steps."""
    print(
        f"signalled in step {running[0].progress.step + running[0].in_step}"
        if running
        else "signalled",
        flush=True,
    )
    os.kill(os.getpid(), number)


running: list[Run] = []
"""The run of this process, once it is prepared."""


def act_at(act: Act, number: int) -> None:
    """Act before the system call of that number."""

    def before(now: int, _: str, __: tuple[Any, ...]) -> None:
        if now == number:
            act()

    durable_files.system = Layer(before)


def act_in_save(act: Act, step: int, number: int, *, torn: bool = False) -> None:
    """Act before a system call in the save of a step; ``torn``: in the middle of it, if it is one
    that writes."""
    calls = Within(step)

    def before(_: int, name: str, words: tuple[Any, ...]) -> None:
        if calls.count(name, words) == number:
            if torn and name == "write":
                os.write(words[0], bytes(words[1])[: len(words[1]) // 2])
            act()

    durable_files.system = Layer(before)


def act_at_rename(act: Act, count: int, after: int = 0) -> None:
    """Act before something gets its name or loses it for the ``count``-th time, or so many system
    calls after."""
    renames = itertools.count(1)
    due: list[int] = []

    def before(now: int, name: str, _: tuple[Any, ...]) -> None:
        if name == "rename" and next(renames) == count:
            due.append(now + after)
        if now in due:
            act()

    durable_files.system = Layer(before)


def act_at_hook(act: Act, hook: str, step: int, *, validating: bool = False) -> None:
    """Act before the first call of a hook after so many steps, or at the start, if it is called
    there; ``validating``: only in validations."""
    acted: list[bool] = []

    def around(_: str, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(**given: Any) -> Any:
            run = given["run"]
            validates = hook != "forward" or run.phase != "train" or not validating
            due = run.progress.step >= step or not hasattr(run, "stream")
            if due and validates and not acted:
                acted.append(True)
                act()
            elif acted and run.phase != "train":
                print("validated on", flush=True)
            return call(**given)

        return called if name == hook else call

    prepared(lambda run: setattr(run, "hook", run.bind(around)))


def act_at_task(act: Act, task: str, count: int) -> None:
    """Act when a task reports its progress for the ``count``-th time."""
    reports = itertools.count(1)

    def prepare(run: Run) -> None:
        report = run.report

        def reported(name: str, done: int, total: int | None = None) -> None:
            if name == task and next(reports) == count:
                act()
            report(name, done, total)

        run.report = reported  # type: ignore[method-assign]

    prepared(prepare)


def prepared(change: Callable[[Run], object] = bool) -> None:
    """Let ``change`` see the run once its hooks are bound and before anything is built."""
    prepare = launch.prepare

    def changed(*words: Any, **more: Any) -> Any:
        run, registry = prepare(*words, **more)
        running.append(run)
        change(run)
        return run, registry

    launch.prepare = changed


class Within:
    """Counts the system calls of the save of one step: the first makes its folder."""

    def __init__(self, step: int) -> None:
        self.folder = f".tmp-{step:08d}-"
        self.thread: int | None = None
        self.numbers = itertools.count(1)

    def count(self, name: str, words: tuple[Any, ...]) -> int:
        """Return which of them this call is; 0 if it is none."""
        if name == "mkdir" and Path(words[0]).name.startswith(".tmp-"):
            # A later save may be made by a thread of the same number.
            own = Path(words[0]).name.startswith(self.folder)
            self.thread = threading.get_ident() if own else None
        return next(self.numbers) if self.thread == threading.get_ident() else 0


def refuse(number: int, errors: dict[int, int]) -> None:
    """Refuse the system call of that number in the saves of these steps, each with its error; note
    what it was on stdout. A disk that is full takes a part of what it can no longer take."""
    calls = {step: Within(step) for step in errors}

    def before(_: int, name: str, words: tuple[Any, ...]) -> None:
        for step, error in errors.items():
            if calls[step].count(name, words) == number:
                print("refused:", name, flush=True)
                if name == "write" and error != errno.EIO:
                    os.write(words[0], bytes(words[1])[: len(words[1]) // 2])
                raise OSError(error, os.strerror(error), *map(str, _paths(words)[:1]))

    durable_files.system = Layer(before)


def refuse_at(number: int, error: int) -> None:
    """Refuse the system call of that number."""

    def before(now: int, name: str, words: tuple[Any, ...]) -> None:
        if now == number:
            raise OSError(error, os.strerror(error), *map(str, _paths(words)[:1]))

    durable_files.system = Layer(before)


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

    durable_files.system = Layer(before)


def take_parts() -> None:
    """Be a disk that takes no more than a part of every write."""
    taking = durable_files.system = Layer(lambda *_: None)
    taking.write = lambda file, data: os.write(file, data[: len(data) // 2 + 1])  # type: ignore[attr-defined]


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

    durable_files.system = Layer(before)


class Recorder:
    """The system calls, each noted with all that it needs to be made again, by paths."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.paths: dict[int, str] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(durable_files.System, name)

        def made(*words: Any) -> Any:
            known = [
                self.paths[word] if isinstance(word, int) and n == 0 else word
                for n, word in enumerate(words)
            ]
            noted = [str(word) if isinstance(word, Path) else word for word in known]
            noted = [bytes(word) if isinstance(word, memoryview) else word for word in noted]
            answer = call(*words)
            if name == "open":
                self.paths[answer] = str(words[0])
            self.calls.append((name, *noted))
            return answer

        return made


def record(target: Path) -> None:
    """Write all system calls of the run's saves to a file, those that delete included, and where a
    save returned."""
    recorder = durable_files.system = Recorder()
    publishing, prune = publish.publish, directory.prune

    def published(home: Path, *words: Any, **more: Any) -> Manifest:
        written = publishing(home, *words, **more)
        recorder.calls.append(("published", str(home / folder_name(written.step))))
        return written

    def pruned(*words: Any, **more: Any) -> list[Manifest]:
        left = prune(*words, **more)
        target.write_bytes(pickle.dumps(recorder.calls))
        return left

    publish.publish, directory.prune = published, pruned


def _paths(words: tuple[Any, ...]) -> list[Path]:
    return [word for word in words if isinstance(word, Path)]
