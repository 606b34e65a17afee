"""Count the Python calls of a function, and those of the steps of a run."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

from fundamentallm import Run, hookimpl, plugin

if TYPE_CHECKING:
    from collections.abc import Callable


def python_calls(function: Callable[[], object]) -> int:
    """Return how many Python calls a function makes."""
    found = 0

    def count(frame: object, event: str, _: object) -> None:
        nonlocal found
        found += event == "call"

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


@plugin
class CallsBetween:
    """Counts the Python calls from the data of one step to that of another."""

    first: int
    last: int
    found: int = 0

    @hookimpl(wrapper=True)
    def collect_batches(self, run: Run):
        if run.progress.step == self.first:
            gc.disable()  # when a collection falls due is chance, and torch listens to it
            sys.setprofile(self.note)
        if run.progress.step == self.last:
            sys.setprofile(None)
            gc.enable()
        return (yield)

    def note(self, frame: Any, event: str, _: object) -> None:
        self.found += event == "call"
