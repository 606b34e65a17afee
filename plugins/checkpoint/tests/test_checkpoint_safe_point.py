"""What a safe point asks of the file system: nothing, if it does not save; and never a manifest."""

from __future__ import annotations

import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from fundamentallm import Period, field, hookimpl, plugin
from fundamentallm_checkpoint import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

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
def calls_of_the_file_system() -> Iterator[list[str]]:
    """Collect the names of the system calls that this thread makes."""
    found: list[str] = []

    def profile(_: Any, event: str, called: Any) -> None:
        if event == "c_call":
            module, name = getattr(called, "__module__", ""), called.__name__
            if (module in ("posix", "fcntl") and name not in HARMLESS) or module == "_io":
                found.append(f"{module}.{name}")

    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(None)


@plugin
class Watches:
    """Collects what every safe point asks of the file system, by step."""

    calls: dict[int, list[str]] = field(init=False, factory=dict)
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
                with calls_of_the_file_system() as calls:
                    answer = safe_point(run=run)
                self.calls[run.progress.step] = calls
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
