"""What a save tells of how far it is."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from fundamentallm import Period, field, hookimpl, plugin
from fundamentallm_checkpoint import Checkpoint
from fundamentallm_checkpoint.storage import durable_files

if TYPE_CHECKING:
    import pytest

    from fundamentallm import Run
    from fundamentallm.testing import TinyRun


class SlowDisk(durable_files.System):
    """Takes its time to make durable what a save beside the steps has written."""

    @staticmethod
    def fsync(number: int) -> None:
        if threading.current_thread().name == "checkpoint":
            time.sleep(0.15)
        durable_files.System.fsync(number)


@plugin
class Hears:
    """Keeps what saves told, and which files there were when they told that it is all."""

    told: list[tuple[int, int | None]] = field(init=False, factory=list)
    there: list[set[str]] = field(init=False, factory=list)

    @hookimpl
    def on_progress(self, run: Run, task: str, done: int, total: int | None) -> None:
        if task != "saving":
            return
        self.told.append((done, total))
        if done == total:
            found = (run.folder / "checkpoints").glob(".tmp-*/*")
            self.there.append({path.name for path in found})


def test_a_save_that_is_waited_for_ends_what_it_began_to_tell(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable_files, "system", SlowDisk())
    hears = Hears()
    tiny_run(Checkpoint(every=Period(1)), hears, length=2)
    assert hears.told[0][0] != hears.told[0][1], "the first save is waited for by the second"
    assert [done == total for done, total in hears.told].count(True) == 2
    assert hears.told[-1][0] == hears.told[-1][1]


def test_a_save_is_not_told_to_be_done_before_its_files_are_durable(tiny_run: TinyRun) -> None:
    hears = Hears()
    tiny_run(Checkpoint(every=Period(1), asynchronous=False), hears, length=2)
    expected = {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert len(hears.there) == 2
    assert all(found >= expected for found in hears.there)
