"""Several processes save as one, and any number of them continues what another number began."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
from ragged import GPT, Ragged, assert_same_rows, bits, furthest

from fundamentallm import Period, Run, StorageError, hookimpl, load_run, plugin
from fundamentallm.testing import Trained, TwoProcesses
from fundamentallm.testing import weights as weights_of
from fundamentallm_checkpoint import Checkpoint

LENGTH, DIES, LAST = 16, 10, 8  # steps; the last checkpoint before the process dies
PLUGINS = ("gpt", "adamw", "ema", "lr_schedule", "guard", "accumulate", "validation", "grad_clip")


@plugin
class Dies:
    """Kills the second process of two, or the only one, between a checkpoint and a row."""

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if run.progress.step == DIES and run.rank == run.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


Train = Callable[..., list[Trained]]


@pytest.fixture
def train(two_processes: TwoProcesses, tmp_path: Path) -> Train:
    """Train in a number of processes, in the folder with a name."""

    def start(processes: int, name: str, *more: Any, dropout: float = 0.0) -> list[Trained]:
        tables = {
            "gpt": GPT["gpt"] | {"dropout": dropout},
            "guard": {"spike": "skip", "spike_window": 5},
            "accumulate": {"microbatches": 2},
            "checkpoint": {"every": 4, "asynchronous": False},
        }
        return two_processes(
            *(Ragged(), *PLUGINS, "checkpoint", *more),
            settings=tables,
            processes=processes,
            run_dir=tmp_path / name,
            length=LENGTH,
            log_every=3,
            validate_every=6,
        )

    return start


def killed(train: Train, processes: int, name: str, **more: Any) -> None:
    with pytest.raises(RuntimeError, match="has died"):
        train(processes, name, Dies(), **more)


def test_two_processes_that_continue_end_with_the_bits_of_two_that_never_stopped(
    train: Train,
) -> None:
    whole = train(2, "whole", dropout=0.2)
    killed(train, 2, "killed", dropout=0.2)
    for one, never in zip(train(2, "killed", dropout=0.2), whole, strict=True):
        assert one.outcome == "finished", one.error
        assert bits(one.weights) == bits(never.weights)
        assert repr(one.states) == repr(never.states)
        assert_same_rows(one.history, [row for row in never.history if row["step"] > LAST])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_another_number_of_processes_continues_the_run(
    train: Train, before: int, after: int
) -> None:
    (alone,) = train(1, "whole")
    killed(train, before, "killed")
    for one in train(after, "killed"):
        assert one.outcome == "finished", one.error
        assert furthest(one.weights, alone.weights) <= 1e-14
        assert_same_rows(one.history, [row for row in alone.history if row["step"] > LAST])


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Return a local file with a plugin that is a tiny data source, model and optimizer."""
    path = tmp_path / "parts.py"
    path.write_text(
        "import os\n"
        "from fundamentallm import hookimpl, plugin\n"
        "from fundamentallm.testing import TinyParts\n\n\n"
        "@plugin\nclass Parts(TinyParts):\n"
        "    dies: int = 0\n\n"
        "    @hookimpl\n    def on_step_end(self, run):\n"
        "        if run.rank == 0 and run.progress.step == self.dies:\n"
        "            os.kill(os.getpid(), 9)\n"
    )
    return path


def test_one_process_loads_what_two_have_saved(
    two_processes: TwoProcesses, parts: Path, tmp_path: Path
) -> None:
    trained = two_processes(str(parts), "checkpoint")
    assert bits(weights_of(load_run(tmp_path / "run"))) == bits(trained[0].weights)


def test_a_process_that_has_lost_the_first_one_names_the_checkpoint_and_how_to_resume(
    parts: Path,
) -> None:
    text = (
        'plugins = ["./parts.py", "checkpoint", "ddp"]\nrun = {length = 9, device = "cpu"}\n'
        "parts = {dies = 5}\nddp = {timeout = 20.0}\n"
        "checkpoint = {every = 2, asynchronous = false}\n"
    )
    folder = parts.parent
    (folder / "tiny.toml").write_text(text)
    first, second = ranks.run(["train", "tiny.toml", "--run-dir", "run"], folder)
    assert (first.code, second.code) == (-signal.SIGKILL, 8)
    advice = "the newest finite checkpoint is run/checkpoints/step-00000004; resume with:"
    assert advice in second.errors, second.errors


def test_all_processes_keep_the_checkpoints_outside_of_the_run_folder(
    two_processes: TwoProcesses, tmp_path: Path
) -> None:
    kept = Checkpoint(every=Period(2), folder=tmp_path / "store")
    for length in (4, 6):
        for one in two_processes(kept, length=length):
            assert (one.outcome, one.step) == ("finished", length), one.error
    (home,) = (tmp_path / "store" / "run").iterdir()
    assert home.name == (tmp_path / "run" / "run-id").read_text().strip()
    manifest = json.loads((home / "step-00000006" / "manifest.json").read_text())
    assert manifest["run"] == home.name


def test_the_first_process_decides_what_is_among_the_best(
    two_processes: TwoProcesses, tmp_path: Path
) -> None:
    kept = Checkpoint(every=Period(99), keep_best=1, mode="max", save_final=False)
    for one in two_processes(kept, length=9, validate_every=2):
        assert one.outcome == "finished", one.error
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == [
        "step-00000002"
    ]


def test_an_error_before_the_first_step_ends_all_processes_with_its_own_message(
    two_processes: TwoProcesses, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    first, second = two_processes(Checkpoint())
    for one in (first, second):
        assert isinstance(one.error, StorageError)
    assert str(first.error) == str(second.error)
    assert (first.error.printed_elsewhere, second.error.printed_elsewhere) == (False, True)


@pytest.mark.parametrize("damage", ["first", "second"])
def test_the_others_read_the_copy_that_the_first_process_has_chosen(
    two_processes: TwoProcesses, tmp_path: Path, damage: str
) -> None:
    tables = {
        "checkpoint": {"every": 4, "asynchronous": False},
        "archive": {"plugin": "checkpoint", "every": 4},
    }
    two_processes("checkpoint", "archive", settings=tables, length=4)
    home = tmp_path / "run" / "checkpoints"
    home = home if damage == "first" else home / "archive"
    (home / "step-00000004" / "model.safetensors").write_bytes(b"damaged")
    for one in two_processes("checkpoint", "archive", settings=tables, length=6):
        assert (one.outcome, one.step) == ("finished", 6), one.error
