"""The global random number generators of a process, and their seeds."""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_STRIDE = 0x9E3779B97F4A7C15
"""An odd number: multiples of it differ in the lower 32 bits, which are all that torch's generator
of the CPU takes of a seed, until there are 2**32 of them."""
_MASK = 2**64 - 1


class Generators:
    """The random number generators that a model or a data source may draw from.

    They are torch's default generators of the CPU and of the run's kind of device, Python's, and
    numpy's as soon as it is imported.
    """

    def __init__(self, device: str) -> None:
        import torch

        found = [torch.default_generator]
        if device.startswith("cuda"):
            # Before it, there is no generator.
            torch.cuda.init()  # type: ignore[no-untyped-call]
            found += torch.cuda.default_generators
        self._seeds: list[Callable[[int], Any]] = [one.manual_seed for one in found]
        self._states: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
            *((one.get_state, one.set_state) for one in found),
            (random.getstate, random.setstate),
        ]
        if device == "mps":
            self._seeds.append(torch.mps.manual_seed)
            self._states.append((torch.mps.get_rng_state, torch.mps.set_rng_state))

    def seed(self, seed: int, index: int = 0) -> None:
        """Seed all generators with the ``index``-th of the seeds that follow from ``seed``."""
        # Called in every step: the bound methods of generators cost no Python call.
        mixed = (seed + index * _STRIDE) & _MASK
        for manual_seed in self._seeds:
            manual_seed(mixed)
        random.seed(mixed)
        numpy = sys.modules.get("numpy.random")
        if numpy is not None:
            # The other half: numpy's generator is torch's, and would draw the same bits.
            numpy.seed(mixed >> 32)

    @contextmanager
    def aside(self, seed: int) -> Iterator[None]:
        """Seed all generators for a block, and put their states back at its end."""
        states = list(self._states)
        if (numpy := sys.modules.get("numpy.random")) is not None:
            states.append((numpy.get_state, numpy.set_state))
        kept = [(put, get()) for get, put in states]
        self.seed(seed)
        try:
            yield
        finally:
            for put, state in kept:
                put(state)
