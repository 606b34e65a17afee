"""Choose the steps that are timed hook by hook, and add up their times."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any, TypeAlias

from fundamentallm_throughput.clock import added

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from fundamentallm_throughput.clock import Key, Marks, Part

    Sample: TypeAlias = tuple[int, Any, Any, list[Part]]

MOST_PENDING = 10_000
"""Largest number of samples that wait for the next row; of more, the oldest are dropped."""

RECENT = 8
"""Number of samples that processes are compared by."""


def turns(every: int, random: Random) -> Iterator[tuple[int, int]]:
    """Yield the steps to time, counted from 1, and the number of steps that each represents.

    One step of each window of ``every`` steps is chosen; the first windows are smaller and double,
    so that a short run has samples, too. The first step is not part of this. In ``every`` windows,
    each place in the window is chosen once, in random order, so that periodic work, for example in
    every tenth step, is sampled as often as it happens.
    """
    before, size = 1, 1
    order: list[int] = []
    while True:
        if size < every:
            place = random.randrange(size)
        else:
            order = order or random.sample(range(every), every)
            place = order.pop()
        yield before + 1 + place, size
        before, size = before + size, min(2 * size, every)


class Samples:
    """Adds up the times in sampled steps, weighted by the number of steps that each represents.

    A device may execute a step after the host has left it: ``settle`` adds the completed ones.
    """

    def __init__(self, marks: Marks) -> None:
        self.count = self.weight = 0
        """Numbers of samples, and of the steps that they represent."""
        self.seconds = 0.0
        """Seconds of these steps."""
        self.parts: defaultdict[Key, float] = defaultdict(float)
        """Seconds in hooks by phase and plugin."""
        self.first: dict[Key, float] = {}
        """Seconds of the first step, which represents no other."""
        self.recent: deque[dict[Key, float]] = deque(maxlen=RECENT)
        """Seconds of the last samples."""
        self.pending: deque[Sample] = deque(maxlen=MOST_PENDING)
        """Samples that the device has not completed: weight, begin, end and parts."""
        self._marks = marks

    def settle(self) -> None:
        """Add the samples that the device has completed; do not wait."""
        while self.pending and self._marks.reached(self.pending[0][2]):
            self._add(*self.pending.popleft())

    def _add(self, weight: int, start: Any, end: Any, parts: list[Part]) -> None:
        taken = added(parts, self._marks.seconds)
        between = taken.pop(None, 0.0)
        found = {key: seconds for key, seconds in taken.items() if key is not None}
        if not weight:
            self.first = found
            return
        self.recent.append(found)
        self.count += 1
        self.weight += weight
        self.seconds += weight * (self._marks.seconds(end, start) - between)
        for key, seconds in found.items():
            self.parts[key] += weight * seconds
