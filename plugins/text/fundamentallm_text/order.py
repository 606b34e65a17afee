"""Which windows are read in which order: pure functions of (seed, index of the sample).

A window is ``length`` input tokens and the one that follows; it is named by where it starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Starts: TypeAlias = NDArray[np.int64]
    Words: TypeAlias = NDArray[np.uint64]

U = np.uint64
GOLDEN = U(0x9E3779B97F4A7C15)
ROUNDS = 8


class Order(Protocol):
    """An order of windows."""

    @property
    def epoch_samples(self) -> int | None:
        """Windows in one pass; None if there is no such thing as a pass."""
        ...

    def starts(self, first: int, count: int) -> Starts:
        """Return where the windows of samples ``first`` to ``first + count - 1`` start."""
        ...


@dataclass(frozen=True)
class RandomWindows:
    """Sample ``i`` is the window at hash(seed, i): any window, with replacement, for ever."""

    tokens: int
    length: int
    seed: int

    @property
    def epoch_samples(self) -> None:
        """There are no passes."""

    def starts(self, first: int, count: int) -> Starts:
        """Return the starts of ``count`` samples from ``first`` on."""
        index = np.arange(first, first + count, dtype=np.uint64)
        return (hashes(self.seed, index) % U(self.tokens - self.length)).astype(np.int64)


@dataclass(frozen=True)
class EpochWindows:
    """Every epoch reads each of the windows that lie side by side once, in an order of its own.

    The tokens that are left over by whole windows are where an epoch begins to lay them: each
    epoch begins at another of these offsets.
    """

    tokens: int
    length: int
    seed: int

    @property
    def epoch_samples(self) -> int:
        """Windows that lie side by side."""
        return (self.tokens - 1) // self.length

    def starts(self, first: int, count: int) -> Starts:
        """Return the starts of ``count`` samples from ``first`` on, across epochs if need be."""
        windows = self.epoch_samples
        index = np.arange(first, first + count, dtype=np.uint64)
        epoch, place = index // U(windows), index % U(windows)
        keys = hashes(self.seed, epoch * U(2))
        spare = U((self.tokens - 1) % self.length + 1)
        offset = hashes(self.seed, epoch * U(2) + U(1)) % spare
        return (offset + permuted(place, windows, keys) * U(self.length)).astype(np.int64)


@dataclass(frozen=True)
class EvenWindows:
    """``wanted`` of the windows that lie side by side, spread evenly; all of them if None."""

    tokens: int
    length: int
    wanted: int | None = None

    @property
    def epoch_samples(self) -> int:
        """Windows in a pass."""
        windows = (self.tokens - 1) // self.length
        return windows if self.wanted is None else min(windows, self.wanted)

    def starts(self, first: int, count: int) -> Starts:
        """Return the starts of ``count`` windows from ``first`` on."""
        windows = (self.tokens - 1) // self.length
        index = np.arange(first, first + count, dtype=np.int64)
        return index * windows // self.epoch_samples * self.length


def share(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the part (begin, end) of ``size`` samples that process ``rank`` takes.

    The parts of all ranks are a partition, in the order of the ranks, none more than one larger
    than another: the samples of a global micro-batch are the same on any number of processes.
    """
    return size * rank // world_size, size * (rank + 1) // world_size


def scramble(words: Words) -> Words:
    """Mix the bits of 64-bit words: the finalizer of splitmix64 (Steele, Lea and Flood, *Fast
    splittable pseudorandom number generators*, 2014), a bijection."""
    words = (words ^ (words >> U(30))) * U(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> U(27))) * U(0x94D049BB133111EB)
    return words ^ (words >> U(31))


def hashes(seed: int, index: Words) -> Words:
    """Return 64 bits for every index: splitmix64, put at once to the place ``index``.

    The seed is scrambled first, or the sequences of two seeds could be one, shifted.
    """
    origin = scramble(np.array([seed], dtype=np.uint64))
    return scramble(origin + (index + U(1)) * GOLDEN)


def permuted(index: Words, count: int, keys: Words) -> Words:
    """Return where the permutation of 0 … ``count - 1`` that each key stands for puts each index.

    A Feistel network on a grid (Black and Rogaway, *Ciphers with arbitrary finite domains*, 2002)
    that barely exceeds ``count``; what lands outside goes through again. Needs no memory, so the
    order of any place of any epoch is known without the places before it.
    """
    columns = isqrt(max(count - 1, 0)) + 1
    rows = -(-count // columns)
    found = _through_grid(index, U(columns), U(rows), keys)
    while (outside := found >= U(count)).any():
        found[outside] = _through_grid(found[outside], U(columns), U(rows), keys[outside])
    return found


def _through_grid(index: Words, columns: np.uint64, rows: np.uint64, keys: Words) -> Words:
    column, row = index // rows, index % rows
    for turn in range(ROUNDS):
        keys = scramble(keys + GOLDEN)
        if turn % 2:
            row = (row + scramble(keys ^ column) % rows) % rows
        else:
            column = (column + scramble(keys ^ row) % columns) % columns
    return column * rows + row
