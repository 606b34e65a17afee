"""A process that dies, fails or is asked to end: all end soon, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from safetensors.torch import load_file

STEPS = 24
END = "checkpoints/step-00003000/model.safetensors"
PARTS = """
from fundamentallm import hookimpl, plugin
from fundamentallm.testing import TinyModel, TinyParts


@plugin
class Parts(TinyParts):
    dropout: float = 0.1

    @hookimpl
    def build_model(self):
        return TinyModel(dropout=self.dropout).build_model()
"""
ACCIDENT = '''
"""An accident in one process."""

import os
import signal

import torch

from fundamentallm import DataError, StorageError, hookimpl, plugin


@plugin
class Accident:
    role = "control"

    how: str = "none"
    rank: int = 1
    step: int = 5
    moment: str = "step"
    once: str = ""

    def happens(self, run):
        if run.rank != self.rank or self.how == "none":
            return
        if self.once:
            if os.path.exists(self.once):
                return
            open(self.once, "w").close()
        if self.how.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.how))
            self.how = "none"
        elif self.how == "raise":
            raise RuntimeError("it broke")
        elif self.how == "data":
            raise DataError("the file is damaged")
        elif self.how == "full":
            raise StorageError("no space left on device")
        elif self.how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")

    @hookimpl
    def finish_gradients(self, run):
        if self.moment == "step" and run.progress.step + 1 == self.step:
            self.happens(run)

    @hookimpl
    def on_progress(self, run, task):
        if self.moment == task and run.progress.step == self.step:
            self.happens(run)

    @hookimpl
    def on_checkpoint_saved(self, run):
        if self.moment == "save" and run.progress.step >= self.step:
            self.happens(run)

    @hookimpl(wrapper=True)
    def forward(self, run):
        loss = yield
        if self.how == "not_finite" and run.rank == self.rank and run.progress.step + 1 == self.step:
            loss = loss * float("nan")
        return loss
'''
TABLES: dict[str, dict[str, Any]] = {
    "run": {"length": STEPS, "validate_every": 6, "log_every": 4, "device": "cpu"},
    "checkpoint": {"every": "3 steps", "keep_last": 3},
    "ema": {"decay": 0.9},
    "lr_schedule": {"warmup": 4},
    "ddp": {"timeout": 20},
}
LISTED = ["./parts.py", "./accident.py", "lr_schedule", "grad_clip", "ema", "checkpoint", "jsonl"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "accident.py").write_text(ACCIDENT)
    lines = [f"plugins = {json.dumps([*LISTED, 'ddp'])}"]
    for name, table in TABLES.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    (tmp_path / "tiny.toml").write_text("\n".join(lines) + "\n")
    return tmp_path


def accident(how: str, **more: Any) -> list[str]:
    return [f"--set=accident.{key}={value}" for key, value in ({"how": how} | more).items()]


def final(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")


def averages(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "state.safetensors")


def assert_same_end(one: Path, other: Path) -> None:
    for read in (final, averages):
        mine, theirs = read(one), read(other)
        assert mine.keys() == theirs.keys()
        assert all(mine[name].equal(theirs[name]) for name in mine)


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


@pytest.fixture
def whole(folder: Path) -> Path:
    """A run that nothing has interrupted."""
    ended = ranks.run(["train", "tiny.toml", "--run-dir", "whole"], folder)
    assert [one.code for one in ended] == [0, 0], ended
    return folder / "whole"


def resumed(folder: Path, name: str = "hit") -> Path:
    ended = ranks.run(["resume", name, *accident("none")], folder)
    assert [one.code for one in ended] == [0, 0], ended
    return folder / name


SLOW = pytest.mark.slow
SIGNALS = ["SIGTERM", *(pytest.param(name, marks=SLOW) for name in ("SIGINT", "SIGUSR1"))]
# From step 9 on, in the middle of a log period: its entries of all processes are in the checkpoint.
FEW = [pytest.param(0, 13, marks=SLOW), (1, 11)]
MANY = [(rank, step) for rank in (0, 1) for step in (2, 5, 9, 17, 22)]


def check_kill(folder: Path, whole: Path, rank: int, step: int) -> None:
    words = ["train", "tiny.toml", "--run-dir", "hit"]
    ended = ranks.run([*words, *accident("SIGKILL", rank=rank, step=step)], folder)
    assert ended[rank].code == -signal.SIGKILL
    survivor = ended[1 - rank]
    assert survivor.code == 8, survivor
    assert "has ended" in survivor.errors
    if step > 4:
        assert "the newest finite checkpoint is hit/checkpoints/step-" in survivor.errors
        assert "resume hit" in survivor.errors
    assert_same_end(resumed(folder), whole)
    assert rows(folder / "hit") == rows(whole)


@pytest.mark.parametrize(("rank", "step"), FEW)
def test_a_killed_process_ends_the_others_and_the_resumed_run_has_the_same_bits(
    folder: Path, whole: Path, rank: int, step: int
) -> None:
    check_kill(folder, whole, rank, step)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "step"), MANY)
def test_a_process_killed_at_any_step_loses_nothing(
    folder: Path, whole: Path, rank: int, step: int
) -> None:
    check_kill(folder, whole, rank, step)


def test_the_resumed_run_of_three_processes_has_the_same_bits(folder: Path) -> None:
    words, more = ["train", "tiny.toml", "--run-dir"], accident("SIGKILL", rank=2, step=11)
    assert [one.code for one in ranks.run([*words, "whole"], folder, 3)] == [0, 0, 0]
    assert ranks.run([*words, "hit", *more], folder, 3)[2].code == -signal.SIGKILL
    ended = ranks.run(["resume", "hit", *accident("none")], folder, 3)
    assert [one.code for one in ended] == [0, 0, 0], ended
    assert_same_end(folder / "hit", folder / "whole")


FAILURES = {
    "raise": (7, "it broke"),
    "data": (4, "the file is damaged"),
    "full": (5, "no space left"),
    "memory": (6, "error: out of memory"),
}


@pytest.mark.parametrize("rank", [pytest.param(0, marks=SLOW), 1])
@pytest.mark.parametrize("how", FAILURES)
def test_a_failure_in_one_process_ends_all_and_is_printed_once(
    folder: Path, how: str, rank: int
) -> None:
    code, text = FAILURES[how]
    ended = ranks.run(["train", "tiny.toml", *accident(how, rank=rank, step=7)], folder)
    assert (ended[rank].code, ended[1 - rank].code) == (code, 8), ended
    assert [text in one.errors for one in ended] == [rank == 0, rank == 1]


def test_a_loss_that_is_nan_in_one_process_ends_all_with_the_same_error(folder: Path) -> None:
    ended = ranks.run(["train", "tiny.toml", *accident("not_finite")], folder)
    assert [one.code for one in ended] == [3, 3], ended
    assert ["train/loss is nan" in one.errors for one in ended] == [True, False]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=SLOW), 1])
@pytest.mark.parametrize(
    ("name", "moment"), [("SIGTERM", "step"), ("SIGINT", "validation"), ("SIGUSR1", "save")]
)
def test_a_signal_to_one_process_stops_all_at_the_same_step_and_loses_nothing(
    folder: Path, whole: Path, name: str, moment: str, rank: int
) -> None:
    if moment == "save":
        rank = 0  # only the first process saves
    words = ["train", "tiny.toml", "--run-dir", "hit"]
    more = {"rank": rank, "step": 6, "moment": moment}
    ended = ranks.run([*words, *accident(name, **more)], folder)
    number = getattr(signal, name)
    assert [one.code for one in ended] == [128 + number] * 2, ended
    outcome = json.loads((folder / "hit" / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["reason"]) == ("interrupted", name)
    assert 6 <= outcome["step"] <= 12
    assert_same_end(resumed(folder), whole)
    assert rows(folder / "hit") == rows(whole)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_to_all_processes_stops_them_at_the_same_step(
    folder: Path, whole: Path, name: str
) -> None:
    started = ranks.start(["train", "tiny.toml", "--run-dir", "hit"], folder)
    wait_for_checkpoint(folder / "hit", *started)
    for one in started:
        os.kill(one.pid, getattr(signal, name))
    ended = ranks.wait(started)
    assert len({one.code for one in ended}) == 1, ended
    if ended[0].code:  # else it had finished already
        assert ended[0].code == 128 + getattr(signal, name)
        resumed(folder)
    assert_same_end(folder / "hit", whole)


# --- launch


def launched(folder: Path, *words: str) -> ranks.Ended:
    command = ["launch", "--processes", "2", *words, "--run-dir", "hit"]
    (ended,) = ranks.wait([ranks.start_alone(command, folder)])
    return ended


def check_restart(folder: Path, whole: Path, rank: int, step: int) -> None:
    more = accident("SIGKILL", rank=rank, step=step, once="once")
    ended = launched(folder, "--restarts", "2", "train", "tiny.toml", *more)
    assert ended.code == 0, ended
    text = f"process {rank} ended with exit code 137 (killed by signal 9); restarting, 1 of 2"
    assert text in ended.errors
    assert_same_end(folder / "hit", whole)
    assert rows(folder / "hit") == rows(whole)


@pytest.mark.slow
def test_launch_restarts_a_run_whose_process_was_killed(folder: Path, whole: Path) -> None:
    check_restart(folder, whole, rank=1, step=10)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", range(2, 22, 2))
def test_launch_loses_nothing_whichever_process_is_killed(
    folder: Path, whole: Path, rank: int, step: int
) -> None:
    check_restart(folder, whole, rank, step)


@pytest.mark.slow
@pytest.mark.parametrize("how", FAILURES)
def test_launch_exits_with_the_code_of_the_process_that_failed(folder: Path, how: str) -> None:
    code, text = FAILURES[how]
    ended = launched(folder, "train", "tiny.toml", *accident(how, step=7))
    assert ended.code == code, ended
    assert ended.errors.count(text) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_launch_ends_a_run_that_can_be_resumed(
    folder: Path, whole: Path, name: str
) -> None:
    command = ["launch", "--processes", "2", "train", "tiny.toml", "--run-dir", "hit"]
    started = ranks.start_alone([*command, "--set=run.length=4000"], folder)
    wait_for_checkpoint(folder / "hit", started)
    os.kill(started.pid, getattr(signal, name))
    (ended,) = ranks.wait([started])
    assert ended.code == 128 + getattr(signal, name), ended
    step = json.loads((folder / "hit" / "outcome.json").read_text())["step"]
    assert (folder / "hit" / "checkpoints" / f"step-{step:08d}").is_dir()


def wait_for_checkpoint(run: Path, *started: Any, least: int = 1) -> None:
    """Wait until a run has a checkpoint of at least a step, or has ended."""
    while all(one.poll() is None for one in started):
        steps = [int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")]
        if max(steps, default=0) >= least:
            return
        time.sleep(0.02)


@pytest.mark.slow
def test_a_node_may_be_lost_and_come_back_and_no_step_is_lost(folder: Path) -> None:
    """Two launchers on this machine stand for two nodes; 2 processes train as 1 does."""
    from fundamentallm.testing.processes import free_port

    long = ["--set=run.length=3000", "--set=parts.dropout=0.0", "--set=checkpoint.every=50 steps"]
    meet = ["--nodes", "1:2", "--meet", f"127.0.0.1:{free_port()}", "--address", "127.0.0.1"]
    words = ["launch", *meet, "--processes", "1", "--restarts", "3", "--grace", "30"]
    train = ["train", "tiny.toml", *long, "--run-dir", "hit"]
    alone = ranks.run(["train", "tiny.toml", *long, "--run-dir", "alone"], folder, 1)
    assert [one.code for one in alone] == [0]
    first = ranks.start_alone([*words, *train], folder)
    second = ranks.start_alone([*words, *train], folder)
    wait_for_checkpoint(folder / "hit", first, second, least=100)
    ranks.kill_with_children(second.pid)  # as a power cut does
    third = ranks.start_alone([*words, *train], folder)
    ended = ranks.wait([first, third])
    assert [one.code for one in ended] == [0, 0], ended
    one, other = (load_file(folder / run / END) for run in ("hit", "alone"))
    # Other orders of addition in single precision, in 3,000 steps.
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4
