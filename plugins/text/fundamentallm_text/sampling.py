"""The order in which windows are read: pure functions of (seed, index of the sample).

A window is ``length`` input tokens and the token that follows. It is identified by its start, the
index of its first token.
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


class Sampling(Protocol):
    """An order of windows."""

    @property
    def epoch_samples(self) -> int | None:
        """Windows in one epoch; None if there are no epochs."""
        ...

    def starts(self, first: int, count: int) -> Starts:
        """Return the starts of samples ``first`` to ``first + count - 1``, (count,) int64."""
        ...


@dataclass(frozen=True)
class RandomWindows:
    """Sample ``i`` is the window at hash(seed, i): random windows with replacement."""

    tokens: int
    length: int
    seed: int

    @property
    def epoch_samples(self) -> None:
        """There are no epochs."""

    def starts(self, first: int, count: int) -> Starts:
        """Return the starts of ``count`` samples from ``first`` on."""
        index = np.arange(first, first + count, dtype=np.uint64)
        return (hash_indices(self.seed, index) % U(self.tokens - self.length)).astype(np.int64)


@dataclass(frozen=True)
class EpochWindows:
    """Every epoch reads each of the adjacent windows once, in a different order.

    The windows of an epoch begin at an offset that differs from epoch to epoch. It is at most the
    number of tokens that whole windows leave over.
    """

    tokens: int
    length: int
    seed: int

    @property
    def epoch_samples(self) -> int:
        """The number of adjacent windows."""
        return (self.tokens - 1) // self.length

    def starts(self, first: int, count: int) -> Starts:
        """Return the starts of ``count`` samples from ``first`` on, also of several epochs."""
        windows = self.epoch_samples
        index = np.arange(first, first + count, dtype=np.uint64)
        epoch, place = index // U(windows), index % U(windows)
        keys = hash_indices(self.seed, epoch * U(2))
        spare = U((self.tokens - 1) % self.length + 1)
        offset = hash_indices(self.seed, epoch * U(2) + U(1)) % spare
        return (offset + permute(place, windows, keys) * U(self.length)).astype(np.int64)


@dataclass(frozen=True)
class EvenWindows:
    """``wanted`` of the adjacent windows, evenly spaced; all of them if None."""

    tokens: int
    length: int
    wanted: int | None = None

    @property
    def epoch_samples(self) -> int:
        """The number of windows that are read."""
        windows = (self.tokens - 1) // self.length
        return windows if self.wanted is None else min(windows, self.wanted)

    def starts(self, first: int, count: int) -> Starts:
        """Return the starts of ``count`` windows from ``first`` on."""
        windows = (self.tokens - 1) // self.length
        index = np.arange(first, first + count, dtype=np.int64)
        return index * windows // self.epoch_samples * self.length


def share(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the part (begin, end) of ``size`` samples that process ``rank`` reads.

    The parts of all ranks are a partition in the order of the ranks, and their sizes differ by at
    most one. So the samples of a global micro-batch are the same on any number of processes.
    """
    return size * rank // world_size, size * (rank + 1) // world_size


def mix_bits(words: Words) -> Words:
    """Mix the bits of 64-bit words by a bijection.

    This is the finalizer of splitmix64: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
    Generators" (2014).
    """
    words = (words ^ (words >> U(30))) * U(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> U(27))) * U(0x94D049BB133111EB)
    return words ^ (words >> U(31))


def hash_indices(seed: int, index: Words) -> Words:
    """Return 64 random bits for every index: the output of splitmix64 at that position.

    The seed is mixed first. Otherwise the sequences of two seeds could be shifted copies.
    """
    origin = mix_bits(np.array([seed], dtype=np.uint64))
    return mix_bits(origin + (index + U(1)) * GOLDEN)


def permute(index: Words, count: int, keys: Words) -> Words:
    """Map each index by a permutation of 0 … ``count - 1`` that its key selects.

    A Feistel network on a grid of slightly more than ``count`` cells; results outside the range are
    mapped again: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002). It needs no
    table, so any position of any epoch is computed without the positions before it.
    """
    columns = isqrt(max(count - 1, 0)) + 1
    rows = -(-count // columns)
    found = _feistel(index, U(columns), U(rows), keys)
    while (outside := found >= U(count)).any():
        found[outside] = _feistel(found[outside], U(columns), U(rows), keys[outside])
    return found


def _feistel(index: Words, columns: np.uint64, rows: np.uint64, keys: Words) -> Words:
    column, row = index // rows, index % rows
    for number in range(ROUNDS):
        keys = mix_bits(keys + GOLDEN)
        if number % 2:
            row = (row + mix_bits(keys ^ column) % rows) % rows
        else:
            column = (column + mix_bits(keys ^ row) % columns) % columns
    return column * rows + row
