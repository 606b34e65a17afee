"""The steps that are timed inside: which they are, and what they tell of the others."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any, TypeAlias

from fundamentallm_throughput.clock import added

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from fundamentallm_throughput.clock import Key, Marks, Part

    Sample: TypeAlias = tuple[int, Any, Any, list[Part]]

KEPT = 10_000
"""So many samples at most wait for the next row; of more the newest speak for all."""


def turns(every: int, random: Random) -> Iterator[tuple[int, int]]:
    """Yield the steps to time inside, counted from 1, and how many steps each of them stands for.

    It is one of each window of ``every`` steps, behind windows that double up to that size: a short
    run has some, too. The first step stands for none, nor does any for it. In ``every`` windows of
    full size each place in the window has its turn once, in an order drawn by lot: what happens in
    every tenth step, say, is met as often as it happens.
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
    """Adds up what was timed in steps, each as often as the steps that it stands for.

    A device comes to a step when the host has left it long ago: ``settle`` takes what is done.
    """

    def __init__(self, marks: Marks) -> None:
        self.count = self.weight = 0
        """Of the samples, and of the steps that they stand for."""
        self.seconds = 0.0
        """What these steps took."""
        self.parts: defaultdict[Key, float] = defaultdict(float)
        """The same by phase and plugin, as far as it was in hooks."""
        self.first: dict[Key, float] = {}
        """The parts of the first step, which stands for no other."""
        self.pending: deque[Sample] = deque(maxlen=KEPT)
        """The steps that each stands for, its begin, its end, and its parts."""
        self._marks = marks

    def settle(self) -> None:
        """Add what the device has done by now; wait for nothing."""
        while self.pending and self._marks.reached(self.pending[0][2]):
            self._add(*self.pending.popleft())

    def _add(self, weight: int, start: Any, end: Any, parts: list[Part]) -> None:
        taken = added(parts, self._marks.seconds)
        between = taken.pop(None, 0.0)
        found = {key: seconds for key, seconds in taken.items() if key is not None}
        if not weight:
            self.first = found
            return
        self.count += 1
        self.weight += weight
        self.seconds += weight * (self._marks.seconds(end, start) - between)
        for key, seconds in found.items():
            self.parts[key] += weight * seconds
