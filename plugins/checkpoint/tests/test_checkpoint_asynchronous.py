"""Asynchronous saving: what is saved, what waits for it, and when it is reported."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fundamentallm import Period, StorageError, field, hookimpl, plugin, train
from fundamentallm.testing import Recorder, TinyRun, TwoProcesses, assert_same_weights, compose_tiny
from fundamentallm_checkpoint import Checkpoint, resume
from fundamentallm_checkpoint.resume import LoadRequest
from fundamentallm_checkpoint.storage import durable_files
from fundamentallm_checkpoint.storage import snapshot as snapshots
from fundamentallm_checkpoint.storage.host_buffer import HostBuffer
from fundamentallm_checkpoint.storage.retention import Rules

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fundamentallm import Run

THREAD = "checkpoint"


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def pending_saves() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD]


class Gate(durable_files.System):
    """System calls of which the writing thread's wait until the gate is open."""

    def __init__(self) -> None:
        self.opened = threading.Event()

    def write(self, number: int, data: memoryview) -> int:
        if threading.current_thread().name == THREAD:
            assert self.opened.wait(timeout=30)
        return super().write(number, data)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    monkeypatch.setattr(durable_files, "system", made)
    yield made
    made.opened.set()
    for thread in pending_saves():
        thread.join()


@plugin
class Opens:
    """Opens the gate at the end of a step, and waits until what waited there is done."""

    at: int
    gate: Any = field(init=False, default=None)
    seen: list[list[int]] = field(init=False, factory=list)

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if run.progress.step == self.at:
            self.seen.append(saved(run.folder / "checkpoints"))
            self.gate.opened.set()
            for thread in pending_saves():
                thread.join()


def opens(at: int, gate: Gate) -> Opens:
    made = Opens(at=at)
    made.gate = gate
    return made


def test_steps_continue_while_a_save_is_written_and_it_holds_its_own_step_only(
    gate: Gate, tiny_run: TinyRun, tmp_path: Path
) -> None:
    kept = Checkpoint(every=Period(3), keep_last=9)
    opening = opens(5, gate)
    run = tiny_run(kept, opening, length=7, run_dir=tmp_path / "asynchronous")
    assert opening.seen == [[]]
    assert saved(run.folder / "checkpoints") == [3, 6, 7]
    within = Checkpoint(every=Period(3), keep_last=9, asynchronous=False)
    plain = tiny_run(within, length=7, run_dir=tmp_path / "within")
    assert_same_weights(run, plain)
    for step in (3, 6, 7):
        for name in ("model.safetensors", "optimizer.safetensors"):
            place = Path("checkpoints") / f"step-{step:08d}" / name
            assert (run.folder / place).read_bytes() == (plain.folder / place).read_bytes()


def test_a_run_resumed_from_an_asynchronous_save_ends_bit_identical(
    gate: Gate, tiny_run: TinyRun, tmp_path: Path
) -> None:
    tiny_run(Checkpoint(every=Period(3), save_final=False), opens(5, gate), length=5)
    resumed = tiny_run(Checkpoint(every=Period(3)), length=9)
    assert_same_weights(resumed, tiny_run(length=9, run_dir=tmp_path / "whole"))


def test_only_the_last_save_is_written_by_the_training_thread(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, bool]] = []

    class Noted(durable_files.System):
        def write(self, number: int, data: memoryview) -> int:
            _, _, place = str(Path(f"/proc/self/fd/{number}").readlink()).rpartition("checkpoints/")
            calls.append((place[:13], threading.current_thread() is threading.main_thread()))
            return super().write(number, data)

    monkeypatch.setattr(durable_files, "system", Noted())
    tiny_run(Checkpoint(every=Period(2)), length=5)
    by = {name: {main for place, main in calls if place == name} for name, _ in calls}
    expected = {".tmp-00000002": {False}, ".tmp-00000004": {False}, ".tmp-00000005": {True}}
    assert {name: who for name, who in by.items() if name in expected} == expected


def test_on_checkpoint_saved_is_called_in_the_training_thread_once_the_save_is_durable(
    gate: Gate, tiny_run: TinyRun
) -> None:
    calls: list[tuple[str, int, bool, bool]] = []

    @plugin
    class Listens:
        @hookimpl
        def on_checkpoint_saved(self, run: Run, folder: Path) -> None:
            main = threading.current_thread() is threading.main_thread()
            calls.append(
                (folder.name, run.progress.step, main, (folder / "manifest.json").exists())
            )

    trace = Recorder()
    tiny_run(Checkpoint(every=Period(3)), Listens(), opens(5, gate), length=7, trace=trace)
    assert calls[0] == ("step-00000003", 5, True, True)
    assert calls[1][0] == "step-00000006"
    assert calls[2] == ("step-00000007", 7, True, True)
    names = [name for name in trace.names if name in ("on_checkpoint_saved", "on_train_end")]
    assert names == ["on_checkpoint_saved"] * 3 + ["on_train_end"]


class Refuses(durable_files.System):
    """A disk that takes nothing of the steps from ``step`` on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def write(self, number: int, data: memoryview) -> int:
        place = str(Path(f"/proc/self/fd/{number}").readlink())
        _, found, rest = place.partition(".tmp-")
        if found and rest[:8].isdecimal() and self.refuses(int(rest[:8])):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return super().write(number, data)

    def refuses(self, step: int) -> bool:
        return step >= self.step


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_refuses_a_save_ends_the_run_with_path_and_cause(
    asynchronous: bool, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable_files, "system", Refuses(4))
    with pytest.raises(StorageError) as caught:
        tiny_run(Checkpoint(every=Period(2), asynchronous=asynchronous), length=99)
    assert caught.value.exit_code == 5
    home = tmp_path / "run" / "checkpoints"
    assert f"the checkpoint of step 4 could not be saved: {home}/.tmp-00000004-" in str(
        caught.value
    )
    assert "/model.safetensors: Disk quota exceeded" in str(caught.value)
    assert saved(home) == [2]
    assert not list(home.glob(".tmp-*"))
    monkeypatch.setattr(durable_files, "system", durable_files.System())
    resumed = tiny_run(Checkpoint(every=Period(2)), length=6)
    assert_same_weights(resumed, tiny_run(length=6, run_dir=tmp_path / "whole"))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_with_on_save_error_continue_continues_without_the_save(
    asynchronous: bool,
    tiny_run: TinyRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(durable_files, "system", Refuses(4))
    kept = Checkpoint(
        every=Period(2), asynchronous=asynchronous, on_save_error="continue", save_final=False
    )
    run = tiny_run(kept, length=7)
    assert run.outcome == "finished"
    assert saved(run.folder / "checkpoints") == [2]
    said = [r.getMessage() for r in caplog.records if "could not be saved" in r.getMessage()]
    assert [text.split()[4] for text in said] == ["4", "6"]
    assert "The run goes on" in said[0]
    assert_same_weights(run, tiny_run(length=7, run_dir=tmp_path / "plain"))


@pytest.mark.parametrize("length", [5, 6])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_whose_last_save_is_refused_fails_whatever_on_save_error_says(
    asynchronous: bool,
    length: int,
    tiny_run: TinyRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(durable_files, "system", Refuses(4))
    kept = Checkpoint(every=Period(2), asynchronous=asynchronous, on_save_error="continue")
    with pytest.raises(
        StorageError, match=f"step {length} could not be saved.* untouched. It was the last"
    ):
        tiny_run(kept, length=length)
    assert saved(tmp_path / "run" / "checkpoints") == [2]
    said = [r.getMessage() for r in caplog.records if "could not be saved" in r.getMessage()]
    assert [text.split()[4] for text in said] == ["4"]


def test_a_save_that_is_due_while_one_is_written_waits_for_it(
    gate: Gate, tiny_run: TinyRun
) -> None:
    threading.Timer(0.3, gate.opened.set).start()
    run = tiny_run(Checkpoint(every=Period(1), keep_last=9), length=4)
    assert saved(run.folder / "checkpoints") == [1, 2, 3, 4]


def test_a_save_that_is_due_while_one_is_written_is_skipped_with_when_busy_skip(
    gate: Gate, tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Checkpoint(every=Period(2), keep_last=9, when_busy="skip")
    run = tiny_run(kept, opens(7, gate), length=9)
    assert saved(run.folder / "checkpoints") == [2, 8, 9]
    said = [r.getMessage() for r in caplog.records if "is being written" in r.getMessage()]
    assert said == [f"step {step} is not saved: step 2 is being written" for step in (4, 6)]


def test_two_processes_skip_the_same_saves(
    gate: Gate, two_processes: TwoProcesses, tmp_path: Path
) -> None:
    kept = Checkpoint(every=Period(2), keep_last=9, when_busy="skip")
    for one in two_processes(kept, opens(7, gate), length=9):
        assert one.outcome == "finished", one.error
    assert saved(tmp_path / "run" / "checkpoints") == [2, 8, 9]


class RefusesEarly(Refuses):
    """A disk that takes nothing of the steps before ``step``."""

    def refuses(self, step: int) -> bool:
        return step < self.step


@pytest.mark.parametrize("asynchronous", [True, False])
def test_two_processes_compare_with_the_checkpoints_that_there_are(
    asynchronous: bool,
    two_processes: TwoProcesses,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(durable_files, "system", RefusesEarly(6))
    settings = {"keep_best": 1, "mode": "max", "on_save_error": "continue", "save_final": False}
    kept = Checkpoint(every=Period(99), asynchronous=asynchronous, **settings)
    first, second = two_processes(kept, length=7, validate_every=2)
    assert (first.outcome, second.outcome) == ("finished", "finished"), first.error
    assert saved(tmp_path / "run" / "checkpoints") == [6]


def test_a_milestone_is_never_skipped(gate: Gate, tiny_run: TinyRun) -> None:
    threading.Timer(0.3, gate.opened.set).start()
    kept = Checkpoint(every=Period(2), keep_every=Period(3), when_busy="skip", keep_last=9)
    run = tiny_run(kept, length=4)
    assert saved(run.folder / "checkpoints") == [2, 3, 4]


def test_a_checkpoint_that_is_being_written_counts_among_the_best(
    gate: Gate, tiny_run: TinyRun
) -> None:
    kept = Checkpoint(every=Period(99), keep_best=1, mode="max", save_final=False)
    run = tiny_run(kept, opens(7, gate), length=8, validate_every=2)
    losses = [row["val/loss"] for row in run.history if "val/loss" in row]
    assert losses == sorted(losses, reverse=True), "the test needs a run that gets better"
    assert saved(run.folder / "checkpoints") == [2]


def test_a_run_that_fails_waits_for_the_pending_save(
    gate: Gate, tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @plugin
    class Fails:
        @hookimpl
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 3:
                threading.Timer(0.3, gate.opened.set).start()
                raise ValueError("no more")

    caplog.set_level("INFO")
    with pytest.raises(Exception, match="no more"):
        tiny_run(Checkpoint(every=Period(2)), Fails(), length=9)
    home = tmp_path / "run" / "checkpoints"
    assert saved(home) == [2]
    assert f"saved {home}/step-00000002" in caplog.text
    resumed = tiny_run(Checkpoint(every=Period(2)), length=5)
    assert_same_weights(resumed, tiny_run(length=5, run_dir=tmp_path / "whole"))


@plugin
class GoesBack:
    """Asks once, at the end of a step, to go back to a checkpoint."""

    at: int
    to: str
    once: bool = field(init=False, default=True)
    gate: Any = field(init=False, default=None)
    came_to: list[int] = field(init=False, factory=list)

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if run.progress.step == self.at and self.once:
            self.once = False
            run.rewind(self.to)
            if self.gate is not None:
                threading.Timer(0.3, self.gate.opened.set).start()

    @hookimpl
    def on_rewind(self, run: Run, left: int) -> None:
        assert left == self.at
        self.came_to.append(run.progress.step)


def test_a_rewind_to_the_latest_waits_for_the_pending_save(gate: Gate, tiny_run: TinyRun) -> None:
    back = GoesBack(at=5, to="latest")
    back.gate = gate
    run = tiny_run(Checkpoint(every=Period(4), keep_last=9), back, length=8)
    assert back.came_to == [4]
    assert saved(run.folder / "checkpoints") == [4, 8]


@pytest.mark.parametrize("to", ["step-00000002", "step-2"])
def test_a_rewind_moves_the_void_checkpoints_away(
    to: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    kept = Checkpoint(every=Period(2), keep_last=9, save_final=False)
    back = GoesBack(at=7, to=to)
    run = tiny_run(kept, back, length=7)
    home = run.folder / "checkpoints"
    assert back.came_to == [2]
    (aside,) = home.glob("superseded-*")
    assert saved(aside) == [4, 6]
    assert saved(home) == [2, 4, 6]
    plain = resume.load([home], LoadRequest(name="step-4", rules=Rules(keep_last=1)))
    void = resume.load([aside], LoadRequest(name="step-4", rules=Rules(keep_last=1)))
    assert plain is not None
    assert void is not None
    samples = [one.snapshot["progress"]["samples"] for one in (void, plain)]
    assert samples == [16, 36], "the data goes on behind what was read"


def test_only_what_the_last_rewind_moved_away_is_kept(tiny_run: TinyRun) -> None:
    @plugin
    class Twice:
        asked: list[int] = field(init=False, factory=list)

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 5 and len(self.asked) < 2:
                self.asked.append(5)
                run.rewind("step-2")

    run = tiny_run(Checkpoint(every=Period(2), keep_last=9), Twice(), length=6)
    assert len(list((run.folder / "checkpoints").glob("superseded-*"))) == 1
    assert saved(run.folder / "checkpoints") == [2, 4, 6]


def test_a_run_killed_after_a_rewind_resumes_bit_identical(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    @plugin
    class Ends:
        @hookimpl
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 4 and not back.once:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = tiny_run(
        Checkpoint(every=Period(2)),
        GoesBack(at=5, to="step-2"),
        length=8,
        run_dir=tmp_path / "whole",
    )
    back = GoesBack(at=5, to="step-2")
    part = tiny_run(Checkpoint(every=Period(2)), back, Ends(), length=8)
    assert (part.outcome, part.progress.step) == ("interrupted", 4)
    resumed = tiny_run(Checkpoint(every=Period(2)), length=8)
    assert_same_weights(resumed, whole)
    assert resumed.progress.samples == whole.progress.samples


class Kills(durable_files.System):
    """Ends the process at the ``nth`` system call of the thread that writes."""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def __getattribute__(self, name: str) -> Any:
        if name != "left" and threading.current_thread().name == THREAD:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("nth", [1, 17, 26, 55, 77])
def test_a_run_killed_in_the_middle_of_a_save_resumes_bit_identical(
    nth: int, tiny_run: TinyRun, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    step = mmap.mmap(-1, 8)

    @plugin
    class Counts:
        @hookimpl
        def on_step_end(self, run: Run) -> None:
            step[0] = run.progress.step
            time.sleep(0.002)

    child = os.fork()
    if child == 0:
        durable_files.system = Kills(nth)
        run = compose_tiny(Checkpoint(every=Period(2)), Counts(), length=9)
        train(run, run_dir=tmp_path / "run")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    before = saved(tmp_path / "run" / "checkpoints")
    begun = (step[0] - 1) // 2 * 2  # the last step whose save has waited for the one before
    assert (before or [0])[-1] >= begun - 2
    resumed = tiny_run(Checkpoint(every=Period(2)), length=9)
    assert_same_weights(resumed, tiny_run(length=9, run_dir=tmp_path / "whole"))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_all_copies_use_the_same_memory_and_no_more_than_what_is_saved() -> None:
    shared = torch.randn(300, 40)
    model = {
        "a": shared,
        "tied": shared,
        "b": torch.randn(7).to(torch.bfloat16),
        "c": torch.ones(()),
    }
    moments = {"a": {"exp_avg": torch.randn(300, 40).t(), "step": torch.tensor(3.0)}}
    packed = snapshots.pack({"model": model, "optimizer": moments})
    arena = HostBuffer()
    copies = [arena.copy(packed), arena.copy(packed)]
    first, second = (
        [t.data_ptr() for part in c.tensors.values() for t in part.values()] for c in copies
    )
    assert first == second
    weights = copies[0].tensors["model.safetensors"]
    assert weights["a"] is weights["tied"]
    assert arena.copy(packed).size == packed.size
    tensors = [t for part in copies[0].tensors.values() for t in part.values()]
    end = max(t.data_ptr() + t.nbytes for t in tensors)
    assert end - min(first) <= packed.size + 64 * len(tensors)


def test_large_tensors_of_every_layout_are_copied_exactly() -> None:
    made = torch.Generator().manual_seed(1)
    large = [
        torch.randn(700, 701, generator=made).to(kind)
        for kind in (torch.float32, torch.bfloat16, torch.float64, torch.complex64)
    ] * 2
    odd = [large[0].t(), large[0][:, ::2], large[3].conj(), large[2].expand(2, 700, 701)]
    model = {str(number): tensor for number, tensor in enumerate([*large, *odd])}
    copied = HostBuffer().copy(snapshots.pack({"model": model, "optimizer": {}}))
    parts = copied.tensors["model.safetensors"]
    assert [name for name in model if not parts[name].equal(model[name])] == []
    assert len({tensor.data_ptr() for tensor in parts.values()}) == 8


def test_a_copy_does_not_change_with_its_original() -> None:
    weight = torch.ones(5)
    packed = HostBuffer().copy(snapshots.pack({"model": {"w": weight}, "optimizer": {}}))
    weight.zero_()
    assert packed.tensors["model.safetensors"]["w"].tolist() == [1.0] * 5
