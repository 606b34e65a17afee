"""Measure the speed of the run in this process, and estimate the time left."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

    from fundamentallm import Run

_SPAN = 60.0
"""Seconds over which the speed is averaged; more if they have fewer than two steps."""
_MANY = 10
"""Number of steps over which the extra time of the first step of a process is negligible."""


@attrs.frozen
class Counts:
    """The counts at one moment; or the difference between two moments."""

    time: float
    share: float
    step: int
    tokens: int
    samples: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.time + other.time,
            self.share + other.share,
            self.step + other.step,
            self.tokens + other.tokens,
            self.samples + other.samples,
        )

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.time - other.time,
            self.share - other.share,
            self.step - other.step,
            self.tokens - other.tokens,
            self.samples - other.samples,
        )


class Pace:
    """Speed over the last minute of training, and the time left.

    Only steps of this process count. Its first step, which takes longer, is left out when there are
    others. ``share`` is the completed fraction of the run's length at the last ``look``. Between
    ``pause`` and ``go_on`` neither time nor work counts. ``clock`` returns seconds from any origin.
    """

    def __init__(self, run: Run, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._clock = run, clock
        self._paused: Counts | None = None
        self._began = self._now = self._read_counts()
        self._moved = self._now.time  # when the last step was seen
        self._away = self._now - self._now
        self._aside = 0.0  # seconds of pauses that recur
        self._seen = deque([self._now])
        self._lately: Counts | None = None
        self.share = min(self._now.share, 1.0)

    def look(self) -> None:
        """Read the counts of the run."""
        before, self._now = self._now, self._read_counts()
        self.share = min(self._now.share, 1.0)
        if self._now.step != before.step:
            self._moved = self._now.time
        if self._paused is not None:
            # Two more steps show that the pause is over, though its end was not reported.
            if self._now.step - self._paused.step < 2:
                return
            self._paused = None
        self._remember(self._now - self._away)

    def pause(self) -> None:
        """Begin a pause of the training, for example to compile."""
        self.look()
        self._paused = self._paused or self._now

    def go_on(self) -> None:
        """End the pause."""
        self.look()
        if self._paused is None:
            return
        pause, self._paused = self._now - self._paused, None
        self._away += pause
        # A pause before or in the first step does not recur.
        self._aside += pause.time if self._now.step - pause.step > self._began.step else 0.0

    def speeds(self) -> list[str]:
        """Return tokens (or samples, where there are no tokens) and steps per second, if known."""
        lately = self._lately
        if lately is None:
            return []
        of, count = ("tokens", lately.tokens) if lately.tokens else ("samples", lately.samples)
        return [
            f"{short(number / lately.time)} {name}/s"
            for name, number in ((of, count), ("steps", lately.step))
        ]

    def left(self) -> str:
        """Return the time left as ``h:mm:ss``; empty if it is unknown or zero.

        Pauses are assumed to take the same fraction of the time as so far.
        """
        whole, lately = self._run.settings.length.seconds, self._lately
        if self.share == 1:
            return ""
        if whole is not None:
            return clock_face(max(whole * (1 - self.share) - (self._now.time - self._moved), 0.0))
        if lately is None or lately.share <= 0:
            return ""
        now = self._paused or self._now
        trained = now.time - self._away.time - self._began.time
        part = 1 + self._aside / max(trained, lately.time)
        return clock_face(round(lately.time / lately.share * (1 - self.share) * part))

    def _remember(self, counts: Counts) -> None:
        seen = self._seen
        if counts.step < seen[-1].step:  # the run went back to a checkpoint
            seen.clear()
            seen.append(counts)
        elif counts.step > seen[-1].step:
            seen.append(counts)
            if len(seen) == 3 and seen[0] is self._began:
                seen.popleft()
        while len(seen) > 2 and counts.time - seen[1].time >= _SPAN:
            seen.popleft()
        lately = seen[-1] - seen[0]
        known = lately.time > 0 and lately.step > 0
        first = len(seen) == 2 and seen[0] is self._began and lately.step < _MANY
        self._lately = lately if known and not first else None

    def _read_counts(self) -> Counts:
        counts = self._run.progress
        share = self._run.settings.length.done(counts)
        return Counts(self._clock(), share, counts.step, counts.tokens, counts.samples)


def short(number: float) -> str:
    """Write 1234567.0 as ``1.23M``."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def clock_face(seconds: float) -> str:
    """Write 3725.0 seconds as ``1:02:05``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
