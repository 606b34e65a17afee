"""A run and loops written by hand take turns at the device, in one process.

So whatever the machine does meanwhile meets all of them. A turn ends when the device has done all
of its work. What is observed in a turn depends on its segment: its time, the idle part of the
device, the reads of device values, or the time of each step.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import handwritten
from device import Recording

from fundamentallm import Run, hookimpl, plugin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from device import Device

RUN = "run"
READ = handwritten.LOG_EVERY - 10
"""Steps in which reads of device values are counted; there is no row in them."""


class Segment(NamedTuple):
    """A turn of every contestant; of the run and the first rival if not only times are taken."""

    kind: Literal["warm", "time", "idle", "reads", "steps"]
    steps: int


def plan(rounds: int, turn: int, long: int) -> list[Segment]:
    """Return the turns of a race: the times, then what would disturb them.

    Reads are counted between two rows, so these steps begin just after a row.
    """
    segments = [Segment("warm", turn)] * 2 + [Segment("time", turn)] * rounds
    segments += [Segment("idle", turn)]
    done = sum(segment.steps for segment in segments)
    rest = -done % handwritten.LOG_EVERY
    segments += [Segment("warm", rest)] if rest else []
    segments += [Segment("reads", READ), Segment("warm", handwritten.LOG_EVERY - READ)]
    return segments + ([Segment("steps", long)] if long else [])


class Rival:
    """A loop in a thread of its own, which trains only while it has the turn."""

    def __init__(self, name: str, train: Callable[[Iterator[int]], None]) -> None:
        self.name = name
        self.mine, self.its = threading.Semaphore(0), threading.Semaphore(0)
        self.steps = 0
        self.observed: AbstractContextManager[None] = contextlib.nullcontext()
        self.step_ended: Callable[[], None] = lambda: None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.work, args=(train,), daemon=True)
        self.thread.start()

    def train(self, steps: int, observed: AbstractContextManager[None] | None = None) -> None:
        """Make ``steps`` steps, in the context ``observed``; raise what its thread has raised."""
        self.steps, self.observed = steps, observed or contextlib.nullcontext()
        self.mine.release()
        self.its.acquire()
        if self.error is not None:
            raise self.error

    def work(self, train: Callable[[Iterator[int]], None]) -> None:
        try:
            train(self.turns())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits for the turn
            self.error = error
            self.its.release()

    def turns(self) -> Iterator[int]:
        numbers = itertools.count(1)
        while True:
            self.mine.acquire()
            # In this thread: a profiler records the operations of the thread that starts it.
            with self.observed:
                for _ in range(self.steps):
                    yield next(numbers)
                    self.step_ended()
            self.its.release()


class Race:
    """Carries out the turns and keeps what was observed, by contestant."""

    def __init__(
        self, device: Device, rivals: list[Rival], segments: list[Segment], out: Path
    ) -> None:
        self.device, self.rivals, self.out = device, rivals, out
        self.steps = sum(segment.steps for segment in segments)
        self.segments = iter(segments)
        self.rounds = 0
        self.marks: list[Any] | None = None
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        """Seconds of each timed turn."""
        self.idle: dict[str, float] = {}
        self.work: dict[str, Any] = {}
        self.reads: dict[str, list[str]] = {}
        self.step_seconds: dict[str, list[float]] = {}
        for rival in rivals:
            rival.step_ended = self.step_ended

    def begin(self) -> None:
        """Begin the run's turn in the next segment, if there is one."""
        segment = next(self.segments, None)
        if segment is not None:
            self.segment, self.left = segment, segment.steps
            self.turn = contextlib.ExitStack()
            self.turn.enter_context(self.observed(RUN))

    def step_ended(self) -> None:
        if self.marks is not None:
            self.marks.append(self.device.mark())

    def safe_point(self) -> None:
        """Count a step of the run; after the last of its turn, let the rivals train."""
        self.left -= 1
        if self.left:
            return
        self.turn.close()
        self.rounds += 1
        # The rival that is first in one round is last in the next.
        order = self.rivals[:: 1 if self.rounds % 2 else -1]
        for rival in order if self.segment.kind in ("warm", "time") else self.rivals[:1]:
            rival.train(self.segment.steps, self.observed(rival.name))
        self.begin()

    @contextlib.contextmanager
    def observed(self, name: str) -> Iterator[None]:
        """Observe a turn; it ends when the device has done its work."""
        self.device.synchronize()
        kind = self.segment.kind
        if kind == "idle":
            recording = Recording(self.device, self.out / "trace.json")
            recording.start()
            yield
            recording.stop()
            self.idle[name], self.work[name] = recording.share, recording.work
        elif kind == "reads":
            with self.device.host_reads() as found:
                yield
            self.reads[name] = found
        elif kind == "steps":
            self.marks = marks = [self.device.mark()]
            yield
            self.device.synchronize()
            self.marks = None
            self.step_seconds[name] = list(map(self.device.seconds, marks, marks[1:]))
        else:
            began = time.perf_counter()
            yield
            self.device.synchronize()
            if kind == "time":
                self.seconds[name].append(time.perf_counter() - began)


@plugin
class Turns:
    """Lets the rivals train whenever the run has trained for a turn."""

    race: Any = None

    @hookimpl
    def on_train_start(self) -> None:
        self.race.begin()

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        self.race.step_ended()

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        self.race.safe_point()
