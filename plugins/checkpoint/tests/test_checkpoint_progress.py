"""The progress that a save reports."""

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
    """A disk that is slow to sync what an asynchronous save has written."""

    @staticmethod
    def fsync(number: int) -> None:
        if threading.current_thread().name == "checkpoint":
            time.sleep(0.15)
        durable_files.System.fsync(number)


@plugin
class Listens:
    """Collect the reported progress, and the files that exist at each reported end."""

    said: list[tuple[int, int | None]] = field(init=False, factory=list)
    there: list[set[str]] = field(init=False, factory=list)

    @hookimpl
    def on_progress(self, run: Run, task: str, done: int, total: int | None) -> None:
        if task != "saving":
            return
        self.said.append((done, total))
        if done == total:
            found = (run.folder / "checkpoints").glob(".tmp-*/*")
            self.there.append({path.name for path in found})


def test_a_save_that_is_waited_for_reports_its_end(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable_files, "system", SlowDisk())
    listens = Listens()
    tiny_run(Checkpoint(every=Period(1)), listens, length=2)
    assert listens.said[0][0] != listens.said[0][1], "the first save is waited for by the second"
    assert [done == total for done, total in listens.said].count(True) == 2
    assert listens.said[-1][0] == listens.said[-1][1]


def test_a_save_reports_its_end_after_its_files_are_durable(tiny_run: TinyRun) -> None:
    listens = Listens()
    tiny_run(Checkpoint(every=Period(1), asynchronous=False), listens, length=2)
    expected = {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert len(listens.there) == 2
    assert all(found >= expected for found in listens.there)
