"""How fast the run is going, and how long it will take, as seen by this process."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable

    from fundamentallm import Run

_REMEMBERED = 60


@attrs.frozen
class Sight:
    """What was seen at one moment."""

    time: float
    share: float
    tokens: int
    samples: int


class Pace:
    """Speed over the last sixty looks; a resumed run's earlier work does not count.

    ``clock`` returns seconds, from wherever.
    """

    def __init__(self, run: Run, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._clock = run, clock
        self._seen: deque[Sight] = deque(maxlen=_REMEMBERED)
        self.look()

    @property
    def share(self) -> float:
        """How much of the run's length is done, 0 to 1."""
        return min(self._seen[-1].share, 1.0)

    def look(self) -> None:
        """See how far the run is now."""
        progress = self._run.progress
        share = self._run.settings.length.done(progress)
        self._seen.append(Sight(self._clock(), share, progress.tokens, progress.samples))

    def speed(self) -> str:
        """Return tokens per second, or samples where there are no tokens; empty if unknown."""
        first, last = self._seen[0], self._seen[-1]
        seconds = last.time - first.time
        if seconds <= 0 or last.samples == first.samples:
            return ""
        if last.tokens > first.tokens:
            return f"{short((last.tokens - first.tokens) / seconds)} tokens/s"
        return f"{short((last.samples - first.samples) / seconds)} samples/s"

    def left(self) -> str:
        """Return the time that is left as ``h:mm:ss``, or empty if unknown."""
        first, last = self._seen[0], self._seen[-1]
        if last.share <= first.share:
            return ""
        seconds = (last.time - first.time) / (last.share - first.share) * (1 - self.share)
        return clock_face(seconds)


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


def label(metric: str) -> str:
    """Name a metric as briefly as it stays clear: ``train/loss`` is ``loss``."""
    return metric.removeprefix("train/").removeprefix("optim/")


def steps(run: Run) -> str:
    """Write how many steps are done, and of how many where that is known."""
    length = run.settings.length
    total = f"/{int(length.amount):,}" if length.unit == "steps" else ""
    return f"step {run.progress.step:,}{total}"
