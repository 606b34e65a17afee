"""Count the calls of Python functions in a step, with ``sys.setprofile``: exact, in every run alike."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from types import FrameType
from typing import TYPE_CHECKING

import noop
from noop import BETWEEN

if TYPE_CHECKING:
    from collections.abc import Callable

    from noop import Marks


def count(train: Callable[[Marks], object], interval: tuple[int, int]) -> Counter[str]:
    """Return how often each function was called in the steps of ``interval``, by its name."""
    called: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            code = frame.f_code
            called[f"{'/'.join(code.co_filename.split('/')[-3:])}:{code.co_qualname}"] += 1

    first, last = interval
    gc.collect()
    gc.disable()  # when a collection falls due is chance, and torch has it call two functions
    try:
        train({first: lambda: sys.setprofile(note), last: lambda: sys.setprofile(None)})
    finally:
        gc.enable()
    return called


def per_step(train: Callable[[Marks], object], interval: tuple[int, int]) -> float:
    """Return the calls in a step of ``interval``, on average."""
    return count(train, interval).total() / (interval[1] - interval[0])


def main() -> None:
    """Print which functions a step of each loop calls."""
    for name, train in noop.LOOPS.items():
        called = count(train, BETWEEN)
        print(f"{name}: {per_step(train, BETWEEN):.2f} calls in a step")
        for function, times in called.most_common():
            print(f"{times / (BETWEEN[1] - BETWEEN[0]):8.2f}  {function}")


if __name__ == "__main__":
    main()
