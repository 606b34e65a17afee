"""Disks that are full or refuse to be written, and folders that come and go."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import threading
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fundamentallm import Period, StorageError, hookimpl, plugin, state, train
from fundamentallm.testing import Recorder, TinyRun, assert_same_weights, compose_tiny
from fundamentallm_checkpoint import Checkpoint
from fundamentallm_checkpoint.storage import durable_files, host_buffer

if TYPE_CHECKING:
    from fundamentallm import Run

TWO = Period(2)


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def settle() -> None:
    """Wait until what is being saved is."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


class Disk(durable_files.System):
    """A disk with so many bytes free, or one that reports none."""

    def __init__(self, free: int, blocks: int = 10**9) -> None:
        self.free, self.blocks = free, blocks

    def statvfs(self, _: Path) -> Any:
        return SimpleNamespace(f_bavail=self.free, f_frsize=1, f_blocks=self.blocks)


def test_a_disk_without_room_for_a_checkpoint_is_an_error_before_the_first_step(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable_files, "system", Disk(free=300))
    trace = Recorder()
    with pytest.raises(
        StorageError, match=r"no checkpoint can be saved: .*/run/checkpoints: No space"
    ):
        tiny_run(Checkpoint(every=TWO), length=4, trace=trace)
    assert "on_step_start" not in trace.names
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_disk_that_may_be_too_small_for_the_moments_is_a_warning(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(durable_files, "system", Disk(free=2**16 + 1500))
    tiny_run(Checkpoint(every=Period(9), save_final=False), length=1)
    assert "with the optimizer's state, a checkpoint may not fit" in caplog.text


def test_a_disk_that_reports_no_free_space_is_tried(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable_files, "system", Disk(free=0, blocks=0))
    assert saved(tiny_run(Checkpoint(every=TWO), length=4).folder / "checkpoints") == [2, 4]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_without_room_is_not_begun(
    asynchronous: bool, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @plugin
    class Fills:
        @hookimpl
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 3:
                settle()
                monkeypatch.setattr(durable_files, "system", Full())

    class Full(Disk):
        def __init__(self) -> None:
            super().__init__(free=20_000)

        def write(self, *_: object) -> int:
            raise AssertionError("nothing is to be written")

    with pytest.raises(
        StorageError, match=r"step 4 .*bytes are needed, and 20,000 are free. Earlier"
    ):
        tiny_run(Checkpoint(every=TWO, asynchronous=asynchronous), Fills(), length=4)
    assert saved(tmp_path / "run" / "checkpoints") == [2]


def test_a_folder_that_is_not_writable_is_an_error_before_the_first_step(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReadOnly(durable_files.System):
        def mkdir(self, path: Path) -> None:
            if ".tmp-" in path.name:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            super().mkdir(path)

    monkeypatch.setattr(durable_files, "system", ReadOnly())
    trace = Recorder()
    with pytest.raises(StorageError, match=r"checkpoints/\.tmp-probe-.*: Read-only file system"):
        tiny_run(Checkpoint(every=TWO), length=4, trace=trace)
    assert "on_step_start" not in trace.names


def test_a_finished_run_needs_no_room(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_run(Checkpoint(every=TWO), length=4)
    monkeypatch.setattr(durable_files, "system", Disk(free=0))
    assert tiny_run(Checkpoint(every=TWO), length=4).outcome == "finished"


def test_a_run_folder_that_is_deleted_is_made_again_with_the_same_id(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids: list[str] = []

    @plugin
    class Deletes:
        @hookimpl
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 5:
                settle()
                ids.append((run.folder / "run-id").read_text())
                shutil.rmtree(run.folder)

    tiny_run(Checkpoint(every=TWO), Deletes(), length=7)
    assert "run-id was deleted while the run went on; it is written again" in caplog.text
    assert (tmp_path / "run" / "run-id").read_text() == ids[0]
    settings = tomllib.loads((tmp_path / "run" / "settings.toml").read_text())
    assert settings["run"]["length"] == "7 steps"
    assert saved(tmp_path / "run" / "checkpoints") == [6, 7]
    resumed = tiny_run(Checkpoint(every=TWO), length=9)
    assert_same_weights(resumed, tiny_run(length=9, run_dir=tmp_path / "whole"))


def test_a_checkpoint_that_was_being_replaced_when_the_process_died_is_restored(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    class Kills(durable_files.System):
        def rename(self, path: Path, target: Path) -> None:
            super().rename(path, target)
            if target.name.startswith(".old-"):
                os.kill(os.getpid(), signal.SIGKILL)

    @plugin
    class Ends:
        @hookimpl
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    # Ended before its validation, step 4 is saved once more where the run goes on.
    how = {"length": 6, "validate_every": 2}
    assert tiny_run(Checkpoint(every=TWO), Ends(), **how).outcome == "interrupted"
    torch.set_num_threads(1)  # what other threads hold is lost to a child
    child = os.fork()
    if child == 0:
        durable_files.system = Kills()
        train(compose_tiny(Checkpoint(every=TWO), **how), run_dir=tmp_path / "run")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    home = tmp_path / "run" / "checkpoints"
    assert saved(home) == [2]
    trace = Recorder()
    resumed = tiny_run(Checkpoint(every=TWO), trace=trace, **how)
    assert trace.names.count("on_step_start") == 2
    assert_same_weights(resumed, tiny_run(run_dir=tmp_path / "whole", **how))
    assert not list(home.glob(".*"))


def test_later_checkpoints_of_instances_that_are_no_longer_listed_are_moved_away(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    tables = {
        "checkpoint": {"every": 2, "keep_last": 9},
        "archive": {"plugin": "checkpoint", "every": 3, "keep_last": 9},
    }
    tiny_run("checkpoint", "archive", settings=tables, length=6)

    @plugin
    class Asks:
        @hookimpl
        def on_run_start(self, run: Run) -> None:
            run.wanted_checkpoint = "step-2"

    home = tmp_path / "run" / "checkpoints"
    run = tiny_run("checkpoint", Asks(), settings={"checkpoint": tables["checkpoint"]}, length=4)
    assert run.progress.step == 4
    assert saved(home) == [2, 4]
    assert saved(home / "archive") == []
    (aside,) = (home / "archive").glob("superseded-*")
    assert saved(aside) == [3, 6]


@plugin
class Averages:
    """Keeps a large tensor from the first step on."""

    average: Any = state(default=None)

    @hookimpl
    def on_step_end(self) -> None:
        self.average = torch.zeros(2**20)


def test_the_state_of_plugins_counts_after_the_first_step(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable_files, "system", Disk(free=2**22))
    trace = Recorder()
    with pytest.raises(StorageError, match=r"no checkpoint can be saved: .*No space left"):
        tiny_run(Checkpoint(every=Period(9)), Averages(), length=9, trace=trace)
    assert trace.names.count("on_step_start") == 1


def test_too_large_a_state_of_plugins_is_a_warning_with_on_save_error_continue(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(durable_files, "system", Disk(free=2**22))
    kept = Checkpoint(every=Period(9), on_save_error="continue", save_final=False)
    assert tiny_run(kept, Averages(), length=3).outcome == "finished"
    assert "no checkpoint can be saved: " in caplog.text


def test_the_memory_for_the_copy_includes_the_state_of_plugins(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved: list[int] = []
    monkeypatch.setattr(host_buffer.HostBuffer, "reserve", lambda _, size: reserved.append(size))
    tiny_run(Checkpoint(every=TWO), Averages(), length=4)
    assert len(reserved) == 1
    assert reserved[0] > 2**22


@pytest.mark.parametrize(("persistent", "length"), [(True, 0), (False, 4)])
def test_weights_that_no_checkpoint_can_store_are_an_error_before_the_first_step(
    persistent: bool, length: int, tiny_run: TinyRun
) -> None:
    @plugin
    class Adds:
        """Adds a buffer that safetensors has no word for."""

        @hookimpl
        def adapt_model(self, run: Run) -> None:
            buffer = torch.zeros(2, dtype=torch.complex128)
            run.model.register_buffer("waves", buffer, persistent=persistent)

    trace = Recorder()
    said = pytest.raises(StorageError, match=r"waves: .* cannot store torch\.complex128")
    with said if persistent else contextlib.nullcontext():
        tiny_run(Checkpoint(every=Period(9)), Adds(), length=4, trace=trace)
    assert trace.names.count("on_step_start") == length


def test_the_name_of_a_new_run_folder_is_durable_before_the_first_step(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    class Notes(durable_files.System):
        def fsync(self, file: int) -> None:
            synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))
            super().fsync(file)

    monkeypatch.setattr(durable_files, "system", Notes())
    folder = tmp_path / "all" / "runs" / "first"
    tiny_run(Checkpoint(every=TWO), length=2, run_dir=folder)
    for above in (folder.parent, folder.parent.parent, tmp_path):
        assert synced.count(str(above)) == 1
        assert synced.index(str(above)) < synced.index(str(folder / "checkpoints"))
    tiny_run(Checkpoint(every=TWO), length=4, run_dir=folder)
    assert synced.count(str(tmp_path)) == 1


def test_a_run_folder_whose_name_is_not_durable_has_no_id(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails(durable_files.System):
        def fsync(self, file: int) -> None:
            if Path(f"/proc/self/fd/{file}").readlink() == tmp_path:
                raise OSError(errno.EIO, "Input/output error")
            super().fsync(file)

    monkeypatch.setattr(durable_files, "system", Fails())
    for _ in range(2):  # what has failed is not taken for done
        with pytest.raises(StorageError, match="cannot be made durable"):
            tiny_run(Checkpoint(every=TWO), length=2)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_sync_folders_takes_checkpoints(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Plain(durable_files.System):
        def fsync(self, file: int) -> None:
            if Path(f"/proc/self/fd/{file}").readlink().is_dir():
                raise OSError(number, os.strerror(number))
            super().fsync(file)

    monkeypatch.setattr(durable_files, "system", Plain())
    run = tiny_run(Checkpoint(every=TWO), length=2)
    assert saved(run.folder / "checkpoints") == [2]


def test_a_metric_that_is_only_logged_decides_the_best(tiny_run: TinyRun) -> None:
    kept = Checkpoint(every=Period(100), keep_best=1, monitor="train/loss", save_final=False)
    run = tiny_run(kept, length=12, validate_every=5, log_every=2)
    losses = {row["step"]: row["train/loss"] for row in run.history if "train/loss" in row}
    (best,) = [step for step, loss in losses.items() if loss == min(losses.values())]
    assert best in saved(run.folder / "checkpoints")
