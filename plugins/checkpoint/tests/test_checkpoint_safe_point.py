"""What a safe point asks of the file system: nothing, if it does not save; and never a manifest.
How many functions of the package it calls."""

from __future__ import annotations

import inspect
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from fundamentallm import Period, field, hookimpl, plugin
from fundamentallm_checkpoint import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from fundamentallm import Run
    from fundamentallm.testing import TinyRun

# In the module ``posix`` without asking the file system.
HARMLESS = {"fspath", "getpid", "urandom", "register_at_fork", "cpu_count", "fsencode", "fsdecode"}
LISTS: list[list[str]] = []
"""The lists that collect the paths which any thread opens for reading."""


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if LISTS and event == "open":
        path, _, flags = args
        if not flags & 1:  # O_WRONLY
            LISTS[-1].append(str(path))


sys.addaudithook(_audit)  # stays until the process ends; without a list it does nothing


@contextmanager
def calls() -> Iterator[tuple[list[str], list[str]]]:
    """Collect the system calls that this thread makes on files, and its calls of functions that
    the package defines."""
    system: list[str] = []
    functions: list[str] = []

    def profile(frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            module, name = getattr(called, "__module__", ""), called.__name__
            if (module in ("posix", "fcntl") and name not in HARMLESS) or module == "_io":
                system.append(f"{module}.{name}")
        elif event == "call" and is_function_of_the_package(frame):
            functions.append(f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}")

    sys.setprofile(profile)
    try:
        yield system, functions
    finally:
        sys.setprofile(None)


def is_function_of_the_package(frame: FrameType) -> bool:
    """Not comprehensions and lambdas, which later versions of Python inline, nor generators, which
    are entered again for every item, nor the code that attrs writes."""
    code = frame.f_code
    return (
        str(frame.f_globals.get("__name__")).startswith("fundamentallm_checkpoint")
        and not code.co_name.startswith(("<", "__attrs"))
        and not code.co_filename.startswith("<")
        and not code.co_flags & inspect.CO_GENERATOR
    )


@plugin
class Watches:
    """Collects what every safe point asks of the file system, by step."""

    calls: dict[int, list[str]] = field(init=False, factory=dict)
    functions: dict[int, list[str]] = field(init=False, factory=dict)
    opened: dict[int, list[str]] = field(init=False, factory=dict)
    watched: Any = field(init=False, default=None)

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        # At every step: the core replaces the caller of a hook after its first call.
        safe_point = run.hook.on_safe_point
        if safe_point is self.watched:
            return

        def watched(*, run: Run) -> Any:
            LISTS.append([])
            try:
                with calls() as (system, functions):
                    answer = safe_point(run=run)
                self.calls[run.progress.step] = system
                self.functions[run.progress.step] = functions
                for thread in threading.enumerate():
                    if thread.name == "checkpoint":
                        thread.join()
            finally:
                self.opened[run.progress.step] = LISTS.pop()
            return answer

        self.watched = watched
        run.hook.on_safe_point = watched  # type: ignore[method-assign]


def test_a_safe_point_that_does_not_save_touches_no_file(tiny_run: TinyRun) -> None:
    watches = Watches()
    kept = Checkpoint(every=Period(4), keep_best=2, keep_every=Period(8))
    tiny_run(kept, watches, length=11, log_every=3)
    # Step 1 checks the free space; step 5 reports the save of step 4 as finished.
    quiet = {step: watches.calls[step] for step in (2, 3, 5, 6, 7, 9, 10)}
    assert [step for step, calls in quiet.items() if calls] == []
    assert watches.calls[4], "the test has to see the calls of a step that saves"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_safe_point_that_saves_reads_no_manifest(asynchronous: bool, tiny_run: TinyRun) -> None:
    watches = Watches()
    kept = Checkpoint(every=Period(1), keep_last=2, keep_best=2, asynchronous=asynchronous)
    run = tiny_run(kept, watches, length=8, validate_every=1)
    read = {path for paths in watches.opened.values() for path in paths}
    assert [path for path in read if "manifest" in path] == []
    assert [path for path in read if "step-" in path] == []
    kept_ = sorted(path.name for path in (run.folder / "checkpoints").glob("step-*"))
    assert len(kept_) < 8, "the test needs a run that deletes checkpoints"


@pytest.mark.parametrize(
    ("asynchronous", "first", "later", "after"), [(True, 33, 30, 7), (False, 58, 58, 1)]
)
def test_a_safe_point_uses_no_more_functions_of_the_package_than_were_measured(
    asynchronous: bool, first: int, later: int, after: int, tiny_run: TinyRun
) -> None:
    watches = Watches()
    kept = Checkpoint(every=Period(4), keep_best=2, asynchronous=asynchronous)
    tiny_run(kept, watches, length=11, log_every=3)
    idle = [watches.functions[step] for step in (2, 3, 6, 7, 10)]
    assert idle == [["fundamentallm_checkpoint.Checkpoint.on_safe_point"]] * 5
    # Different functions: how often each is called depends on the tensors and values of the state.
    used = {step: sorted(set(watches.functions[step])) for step in (4, 5, 8)}
    assert len(used[4]) <= first, used[4]
    assert len(used[8]) <= later, used[8]
    # An asynchronous save is reported at the safe point after the one that began it.
    assert len(used[5]) <= after, used[5]
