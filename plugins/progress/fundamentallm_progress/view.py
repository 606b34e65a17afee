"""Format a run's training and its running tasks as rows of text."""

from __future__ import annotations

import math
import time
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import attrs

from fundamentallm_progress.pace import Pace, clock_face, short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fundamentallm import Run

    Part: TypeAlias = tuple[str, str]
    Row: TypeAlias = tuple[Part, ...]
    """Texts, each with the name of a style."""
    Bar: TypeAlias = Callable[[int], Iterable[Part]]

_WIDTHS = (24, 16, 8, 5)
_NARROW = 60
"""Terminals with fewer columns show numbers in place of a bar."""
_PIECE = 4
_VALIDATION = "validation"


class Fact(NamedTuple):
    """A text about the training, and its place among those that are shown where room is short."""

    text: str
    rank: float


@attrs.define
class Task:
    """A long task outside of the steps; ``step`` is the run's step at its last report."""

    done: int
    total: int | None
    step: int
    since: float


class View:
    """The state to show. ``rows`` may be called from another thread than the run's."""

    def __init__(
        self, run: Run, metrics: list[str], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._names, self._clock = run, metrics, clock
        self._lock = RLock()
        self._metrics: dict[str, float] = {}
        self._tasks: dict[str, Task] = {}
        self._pace: Pace | None = None
        self._head = ""

    @property
    def empty(self) -> bool:
        """Whether there is no training and no task."""
        return self._pace is None and not self._tasks

    def start_training(self) -> None:
        """Show the steps, speed and time left from now on."""
        self._pace = Pace(self._run, self._clock)

    def keep_metrics(self, metrics: dict[str, float], *, only: bool = False) -> None:
        """Store the metrics of a row; older ones that it lacks stay, unless ``only``."""
        known = metrics if only else self._metrics | metrics
        self._metrics = {name: known[name] for name in self._names if name in known}

    def follow(self, task: str, done: int, total: int | None) -> None:
        """Store the progress of a task; ``done == total`` removes it."""
        with self._lock:
            step = self._run.progress.step
            if done == total:
                self._tasks.pop(task, None)
                if self._pace is not None and not self._tasks:
                    self._pace.go_on()
                return
            if self._pace is not None and not self._tasks:
                self._pace.pause()
            known = self._tasks.get(task)
            since = self._clock() if known is None or done < known.done else known.since
            self._tasks[task] = Task(done, total, step, since)

    def end_validation(self) -> None:
        """Remove the validation, also one whose length was unknown."""
        self.follow(_VALIDATION, 1, 1)

    def end_tasks(self) -> None:
        """Remove all tasks."""
        with self._lock:
            self._tasks.clear()

    def facts(self) -> list[str]:
        """Return share, metrics, speeds and time left, as far as they are known."""
        return [fact.text for fact in self._facts()]

    def _facts(self) -> list[Fact]:
        with self._lock:
            self._forget()
            pace = self._pace
            if pace is None:
                return []
            pace.look()
            left = pace.left()
            facts = [Fact(f"{pace.share:.0%}", 0)]
            for rank, (name, value) in enumerate(self._metrics.items(), 1):
                facts.append(Fact(f"{label(name)} {value:.4g}", rank))
            # Tokens per second before steps per second, which are always the last to be shown.
            facts += map(Fact, pace.speeds(), (2.5, math.inf))
            return [*facts, Fact(f"{left} left", 0.5)] if left else facts

    def rows(self, width: int, line: str = "━─") -> list[Row]:
        """Return a row for the training and one for each task, all within ``width``.

        ``line`` are the two characters that bars are made of.
        """
        with self._lock:
            facts, now = self._facts(), self._clock()
            rows = []
            if self._pace is not None:
                # Never narrower than before, so that the bar does not move.
                self._head = head = count(self._run).ljust(len(self._head))
                done = partial(_full, line, self._pace.share)
                room = width - len(head) - (_WIDTHS[-1] + 2 if width >= _NARROW else 1)
                rows = [_fitted(head, done, _chosen(facts, room), width)]
            names = max(map(len, self._tasks), default=0)
            for name, task in self._tasks.items():
                bar, tail = _task_row(task, now, line)
                rows.append(_fitted(f"  {name:{names}}", bar, tail, width))
            return rows

    def _forget(self) -> None:
        # A task that failed has no end. Two steps later it cannot be running.
        step = self._run.progress.step
        kept = {name: task for name, task in self._tasks.items() if abs(step - task.step) < 2}
        if len(kept) < len(self._tasks):
            self._tasks = kept
            if self._pace is not None and not kept:
                self._pace.go_on()


def count(run: Run) -> str:
    """Return the progress of the run in steps and in the unit of its length."""
    length, step = run.settings.length, f"step {run.progress.step:,}"
    done = length.done(run.progress) * length.amount
    if length.unit == "steps":
        return f"{step}/{int(length.amount):,}"
    if length.unit == "tokens":
        return f"{step}  {short(done)}/{short(length.amount)} tokens"
    if length.seconds is not None:
        return f"{step}  {clock_face(run.progress.seconds)}/{clock_face(length.seconds)}"
    return f"{step}  {done:.2f}/{length}"


def label(metric: str) -> str:
    """Return the short name of a metric: ``train/loss`` is ``loss``."""
    return metric.removeprefix("train/").removeprefix("optim/")


def _chosen(facts: list[Fact], room: int) -> str:
    """Return the most important facts that fit into ``room``, in their order."""
    chosen: list[Fact] = []
    for fact in sorted(facts, key=lambda fact: fact.rank):
        if len(fact.text) <= room:
            chosen.append(fact)
            room -= len(fact.text) + 2
    return "  ".join(fact.text for fact in facts if fact in chosen)


def _task_row(task: Task, now: float, line: str) -> tuple[Bar, str]:
    """Return a task's bar and the text after it."""
    seconds = now - task.since
    took = clock_face(seconds)
    if task.total:
        share = task.done / task.total
        return partial(_full, line, share), f"{share:.0%}  {took}"
    return partial(_wandering, line, int(seconds)), f"{task.done:,}  {took}" if task.done else took


def _fitted(head: str, bar: Bar, tail: str, width: int) -> Row:
    """Put the widest bar that fits between two texts, or none; truncate what is too wide."""
    room = width - len(head) - len(tail) - 2
    size = next((size for size in _WIDTHS if size <= room), 0)
    if size:
        return ((f"{head} ", ""), *bar(size), (f" {tail}", ""))
    return ((f"{head} {tail}"[:width], ""),)


def _full(line: str, share: float, size: int) -> Iterable[Part]:
    cells = int(min(share, 1.0) * size)
    return ((line[0] * cells, "bar.complete"), (line[1] * (size - cells), "bar.back"))


def _wandering(line: str, seconds: int, size: int) -> Iterable[Part]:
    """Return a moving piece, for a task without a known end."""
    place = seconds % (size - _PIECE + 1)
    rest = size - _PIECE - place
    return (
        (line[1] * place, "bar.back"),
        (line[0] * _PIECE, "bar.pulse"),
        (line[1] * rest, "bar.back"),
    )
