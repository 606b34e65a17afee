"""Checkpoints of real runs: saving, resuming, keeping, finding again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from fundamentallm import (
    Period,
    SettingsError,
    StorageError,
    field,
    hookimpl,
    load_run,
    plugin,
    state,
    train,
)
from fundamentallm.testing import (
    PluginContract,
    Recorder,
    TinyOptimizer,
    TinyRun,
    assert_same_weights,
    compose_tiny,
)
from fundamentallm_checkpoint import Checkpoint

if TYPE_CHECKING:
    from fundamentallm import Run

TWO = Period(2)


@plugin
class Counter:
    """Counts steps, in a plain value, a tensor and a tuple, and adds a fleeting number."""

    steps: int = state(0)
    best: float = state(float("inf"))
    seen: object = state(None)
    pair: tuple[int, str] = state((0, ""))

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        import torch

        self.steps += 1
        self.seen = torch.arange(self.steps)
        self.pair = (self.steps, "steps")
        run.log("test/steps", float(self.steps))


@plugin
class Ends:
    """Ends the process as ``kill -9`` does, or asks for the end by a signal."""

    at: int = 0
    by: int = signal.SIGTERM

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if run.progress.step == self.at:
            os.kill(os.getpid(), self.by)


def saved(run: Run | Path) -> list[int]:
    folder = run if isinstance(run, Path) else run.folder / "checkpoints"
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def manifest(run: Run, step: int) -> dict[str, object]:
    path = run.folder / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    return json.loads(path.read_text())


class TestContract(PluginContract):
    plugin = Checkpoint


def test_saves_every_period_and_at_the_end(tiny_run: TinyRun) -> None:
    assert saved(tiny_run(Checkpoint(every=TWO, keep_last=9), length=5)) == [2, 4, 5]


def test_the_last_step_is_not_saved_with_save_final_false(tiny_run: TinyRun) -> None:
    run = tiny_run(Checkpoint(every=TWO, keep_last=9, save_final=False), length=5)
    assert saved(run) == [2, 4]


def test_saving_changes_nothing_of_the_run(tiny_run: TinyRun, tmp_path: Path) -> None:
    saving = tiny_run(Checkpoint(every=Period(1)), length=6, run_dir=tmp_path / "saving")
    assert_same_weights(saving, tiny_run(length=6, run_dir=tmp_path / "plain"))


def test_a_resumed_run_ends_bit_identical(tiny_run: TinyRun, tmp_path: Path) -> None:
    whole, first, second = Counter(), Counter(), Counter()
    uninterrupted = tiny_run(whole, length=9, log_every=4, run_dir=tmp_path / "whole")
    kept = Checkpoint(every=TWO)
    part = tiny_run(kept, first, Ends(at=3), length=9, log_every=4)
    assert (part.outcome, part.progress.step) == ("interrupted", 3)
    resumed = tiny_run(Checkpoint(every=TWO), second, length=9, log_every=4)
    assert_same_weights(uninterrupted, resumed)
    assert resumed.history == uninterrupted.history[-len(resumed.history) :]
    assert (second.steps, second.best, second.pair) == (whole.steps, whole.best, whole.pair)
    assert resumed.progress.step == 9
    assert resumed.progress.tokens == uninterrupted.progress.tokens


def test_a_signal_is_saved_whatever_the_settings_say(tiny_run: TinyRun) -> None:
    run = tiny_run(Checkpoint(every=Period(100), save_final=False), Ends(at=3), length=9)
    assert saved(run) == [3]


@plugin
class KillsSaving:
    """Ends the process in the middle of the ``nth`` save."""

    nth: int = 3
    seen: int = field(init=False, default=0)

    @hookimpl
    def on_progress(self, task: str, done: int, total: int | None) -> None:
        self.seen += task == "saving"
        if self.seen == self.nth and done != total:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("victim", "asynchronous"),
    [(Ends(at=7, by=9), True), (Ends(at=7, by=9), False), (KillsSaving(nth=25), False)],
)
def test_a_killed_run_resumes_bit_identical(
    victim: object, asynchronous: bool, tiny_run: TinyRun, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    torch.set_num_threads(1)  # what other threads hold is lost to a child
    child = os.fork()
    if child == 0:
        kept = Checkpoint(every=TWO, asynchronous=asynchronous)
        train(compose_tiny(kept, victim, length=9), run_dir=folder)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    before = saved(folder / "checkpoints")
    resumed = tiny_run(Checkpoint(every=TWO), length=9, run_dir=folder)
    assert before and before[-1] < 9
    assert_same_weights(tiny_run(length=9, run_dir=tmp_path / "whole"), resumed)
    assert not list((folder / "checkpoints").glob(".*"))


def test_keeps_the_last_the_best_and_the_milestones(tiny_run: TinyRun) -> None:
    kept = Checkpoint(every=Period(1), keep_last=2, keep_best=1, keep_every=Period(5))
    run = tiny_run(kept, TinyOptimizer(lr=0.5), length=12, validate_every=1)
    losses = {int(row["step"]): row["val/loss"] for row in run.history if "val/loss" in row}
    best = min(losses, key=lambda step: (losses[step], step))
    assert saved(run) == sorted({5, 10, 11, 12, best})
    assert "milestone" in manifest(run, 5)["tags"]  # type: ignore[operator]
    assert manifest(run, best)["metrics"]["val/loss"] == losses[best]  # type: ignore[index]


def test_a_checkpoint_has_the_metrics_of_its_own_step(tiny_run: TinyRun) -> None:
    run = tiny_run(Checkpoint(every=Period(1), keep_last=9), length=4, log_every=2)
    known = {step: sorted(manifest(run, step)["metrics"]) for step in (1, 2, 3)}  # type: ignore[call-overload]
    assert known == {1: [], 2: ["optim/lr", "train/loss", "train/tokens"], 3: []}


def test_a_checkpoint_has_no_metrics_of_an_older_validation(tiny_run: TinyRun) -> None:
    kept = Checkpoint(every=Period(1), keep_last=9)
    run = tiny_run(kept, length=4, log_every=1, validate_every=2)
    assert ["val/loss" in manifest(run, step)["metrics"] for step in (1, 2, 3)] == [
        False,
        True,
        False,
    ]


def test_saves_a_validation_that_is_among_the_best(tiny_run: TinyRun) -> None:
    kept = Checkpoint(every=Period(100), keep_last=1, keep_best=1, save_final=False)
    run = tiny_run(kept, length=6, validate_every=3)
    losses = {int(row["step"]): row["val/loss"] for row in run.history if "val/loss" in row}
    assert losses[6] < losses[3], "the test needs a run that gets better"
    assert saved(run) == [3, 6]


def test_a_greater_metric_is_better_with_mode_max(tiny_run: TinyRun) -> None:
    kept = Checkpoint(every=Period(100), keep_best=1, mode="max", save_final=False)
    assert saved(tiny_run(kept, length=6, validate_every=3)) == [3]


def test_on_checkpoint_saved_is_called_for_complete_checkpoints(tiny_run: TinyRun) -> None:
    found: list[tuple[str, bool]] = []

    @plugin
    class Listens:
        @hookimpl
        def on_checkpoint_saved(self, folder: Path) -> None:
            found.append((folder.name, (folder / "manifest.json").is_file()))

    tiny_run(Checkpoint(every=TWO), Listens(), length=4)
    assert found == [("step-00000002", True), ("step-00000004", True)]


def test_a_finished_run_saves_nothing_more(tiny_run: TinyRun) -> None:
    run = tiny_run(Checkpoint(every=TWO), length=4)
    newest = run.folder / "checkpoints" / "step-00000004" / "manifest.json"
    before = newest.stat().st_mtime_ns
    tiny_run(Checkpoint(every=TWO), length=4)
    assert newest.stat().st_mtime_ns == before


def test_a_longer_length_continues_a_finished_run(tiny_run: TinyRun, tmp_path: Path) -> None:
    tiny_run(Checkpoint(every=TWO), length=4)
    longer = tiny_run(Checkpoint(every=TWO), length=7)
    assert_same_weights(longer, tiny_run(length=7, run_dir=tmp_path / "whole"))


def two_instances(**archive: object) -> dict[str, dict[str, object]]:
    rolling = {"every": 2, "keep_last": 2}
    return {"checkpoint": rolling, "archive": {"plugin": "checkpoint", "every": 3, **archive}}


def test_two_instances_have_a_folder_each(tiny_run: TinyRun) -> None:
    run = tiny_run("checkpoint", "archive", settings=two_instances(keep_last=9), length=8)
    assert saved(run) == [6, 8]
    assert saved(run.folder / "checkpoints" / "archive") == [3, 6, 8]


@pytest.mark.parametrize(
    "names", [("checkpoint", "archive"), ("archive", "checkpoint"), ("checkpoint",)]
)
def test_resuming_looks_at_all_instances(names: tuple[str, ...], tiny_run: TinyRun) -> None:
    tables = two_instances(save_final=False)
    tables["checkpoint"] |= {"every": 100, "save_final": False}
    tiny_run("checkpoint", "archive", settings=tables, length=5)
    trace = Recorder()
    kept = {name: tables[name] for name in names}
    run = tiny_run(*names, settings=kept, length=6, trace=trace)
    assert trace.names.count("on_step_start") == 6 - 3
    assert run.progress.step == 6


def test_two_instances_share_the_name_of_their_run(tiny_run: TinyRun) -> None:
    run = tiny_run("checkpoint", "archive", settings=two_instances(), length=6)
    other = run.folder / "checkpoints" / "archive" / "step-00000006" / "manifest.json"
    assert json.loads(other.read_text())["run"] == manifest(run, 6)["run"]


def test_later_checkpoints_than_the_resumed_one_are_moved_away(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_run(Checkpoint(every=TWO, keep_last=9), length=6)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000006" / "manifest.json").unlink()
    (folder / "step-00000004" / "manifest.json").unlink()
    tiny_run(Checkpoint(every=Period(100), save_final=False), length=5)
    assert saved(folder) == [2]
    (aside,) = folder.glob("superseded-*")
    assert saved(aside) == [4, 6]
    assert f"2 later checkpoints were moved to {aside}" in caplog.text


PARTS = """
from fundamentallm import hookimpl, plugin
from fundamentallm.testing import TinyData, TinyModel, TinyOptimizer

@plugin
class Parts:
    @hookimpl
    def build_data(self, run):
        return TinyData().build_data(run)

    @hookimpl
    def build_model(self, run):
        return TinyModel().build_model()

    @hookimpl
    def build_optimizer(self, run):
        return TinyOptimizer(lr=0.5).build_optimizer(run)
"""


@pytest.fixture
def recorded(tmp_path: Path) -> Run:
    """A run that can be loaded again by its folder alone, and that gets worse in the end."""
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "it.toml").write_text(
        f'plugins = ["{tmp_path}/parts.py", "archive", "checkpoint"]\n'
        "run = {length = 12, validate_every = 1, device = 'cpu'}\n"
        "checkpoint = {every = 1, keep_last = 99, keep_best = 1}\n"
        "archive = {plugin = 'checkpoint', every = 99, save_final = false, mode = 'max'}\n"
    )
    return train(tmp_path / "it.toml", run_dir=tmp_path / "run")


def test_loads_the_best_the_latest_or_the_one_named(recorded: Run) -> None:
    from safetensors.torch import load_file

    losses = {int(row["step"]): row["val/loss"] for row in recorded.history}
    best = min(losses, key=lambda step: (losses[step], step))
    assert best < 12
    for wish, step in {"best": best, "latest": 12, "step-00000007": 7, "step-7": 7}.items():
        folder = recorded.folder / "checkpoints" / f"step-{step:08d}"
        expected = load_file(folder / "model.safetensors")
        loaded = load_run(recorded.folder, at=wish).model.state_dict()
        assert all(loaded[name].equal(tensor) for name, tensor in expected.items()), wish


def test_loading_writes_nothing(recorded: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in recorded.folder.rglob("*")}
    load_run(recorded.folder, at="step-00000003")
    assert {path: path.stat().st_mtime_ns for path in recorded.folder.rglob("*")} == before


def test_the_error_for_an_unknown_checkpoint_lists_those_that_exist(recorded: Run) -> None:
    known = r"checkpoints: step-00000012, step-00000011"
    with pytest.raises(StorageError, match=rf"no checkpoint 'step-13' \({known}"):
        load_run(recorded.folder, at="step-13")
    settings = recorded.folder / "settings.toml"
    settings.write_text(settings.read_text().replace('"val/loss"', '"train/tokens"'))
    for path in recorded.folder.rglob("manifest.json"):
        path.write_text(path.read_text().replace('"train/tokens"', '"train/token"'))
    with pytest.raises(StorageError, match="no checkpoint has the metric train/tokens"):
        load_run(recorded.folder, at="best")


def test_a_named_checkpoint_is_never_replaced_by_another(recorded: Run) -> None:
    (recorded.folder / "checkpoints" / "step-00000007" / "model.safetensors").unlink()
    with pytest.raises(StorageError, match=r"step-00000007: model\.safetensors cannot be read"):
        load_run(recorded.folder, at="step-00000007")


def test_nan_in_the_weights_is_a_warning_and_the_last_sound_weights_are_kept(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @plugin
    class Poison:
        @hookimpl
        def settle_step(self, run: Run) -> None:
            if run.progress.step == 3:
                next(run.model.parameters()).data[0, 0] = float("nan")

    kept = Checkpoint(every=Period(1), keep_last=2)
    with pytest.raises(Exception, match="diverged"):
        tiny_run(kept, Poison(), length=9, log_every=8)
    assert saved(tmp_path / "run" / "checkpoints") == [2, 6, 7]
    assert "step 3: 1 of the saved tensors hold NaN or infinity" in caplog.text


def test_rejects_a_monitor_that_nothing_produces(tiny_run: TinyRun) -> None:
    with pytest.raises(
        SettingsError, match=r"checkpoint\.monitor: nothing listed produces 'val/los'"
    ):
        tiny_run(Checkpoint(every=TWO, monitor="val/los"))


def test_files_have_the_permissions_that_the_umask_leaves(tiny_run: TinyRun) -> None:
    before = os.umask(0o027)
    try:
        run = tiny_run(Checkpoint(every=TWO), length=2)
    finally:
        os.umask(before)
    newest = run.folder / "checkpoints" / "step-00000002"
    assert oct(newest.stat().st_mode & 0o777) == oct(0o750)
    assert {oct(path.stat().st_mode & 0o777) for path in newest.iterdir()} == {oct(0o640)}


def test_leftovers_of_dead_processes_are_deleted_and_folders_of_living_ones_are_not(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    from fundamentallm_checkpoint.storage import durable_files

    folder = tmp_path / "run" / "checkpoints"
    for name in (".tmp-00000002-dead", ".trash-step-00000001-dead"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"half")
    with durable_files.locked_folder(folder / ".tmp-00000002-alive"):
        tiny_run(Checkpoint(every=TWO), length=2)
        assert [path.name for path in folder.glob(".*")] == [".tmp-00000002-alive"]


def test_a_state_that_no_checkpoint_can_store_is_named() -> None:
    from fundamentallm_checkpoint.storage.snapshot import pack

    kept = {"strange": {"memory": {"seen": {1, 2}}}}
    with pytest.raises(StorageError, match=r"plugins/strange/memory/seen: .* not <class 'set'>"):
        pack({"model": {}, "optimizer": {}, "plugins": kept})


def test_a_folder_that_cannot_be_made_is_an_error_before_the_first_step(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    (tmp_path / "store").write_text("not a folder")
    trace = Recorder()
    with pytest.raises(StorageError, match=r"store.*: "):
        tiny_run(Checkpoint(every=TWO, folder=tmp_path / "store"), length=2, trace=trace)
    assert "on_step_start" not in trace.names
