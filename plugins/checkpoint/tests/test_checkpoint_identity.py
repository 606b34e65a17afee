"""Each run has checkpoints of its own, also where runs of one name share a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from fundamentallm import FundamentalError, Period, StorageError, hookimpl, plugin
from fundamentallm.testing import Recorder, TinyRun, assert_same_weights
from fundamentallm_checkpoint import Checkpoint, resume
from fundamentallm_checkpoint.cli import rows
from fundamentallm_checkpoint.resume import LoadRequest
from fundamentallm_checkpoint.storage import directory
from fundamentallm_checkpoint.storage import publish as publishing
from fundamentallm_checkpoint.storage import snapshot as snapshots
from fundamentallm_checkpoint.storage.manifest import Manifest
from fundamentallm_checkpoint.storage.retention import Rules

if TYPE_CHECKING:
    from fundamentallm import Run

KEPT = {"every": 2, "keep_last": 9}
RULES = Rules(keep_last=3, monitor="val/loss")


def load(home: Path, name: str | None, run: str) -> resume.Loaded | None:
    return resume.load([home], LoadRequest(name=name, rules=RULES, run=run))


def shared(tmp_path: Path) -> Checkpoint:
    return Checkpoint(every=Period(2), keep_last=9, folder=tmp_path / "store")


def run_id(run: Run | Path) -> str:
    folder = run if isinstance(run, Path) else run.folder
    return (folder / "run-id").read_text().strip()


def contents(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def steps(home: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in home.glob("step-*"))


def test_runs_of_one_name_share_a_folder_and_nothing_else(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = tiny_run(shared(tmp_path), length=4, run_dir=tmp_path / "x" / "r")
    home = tmp_path / "store" / "r" / run_id(one)
    assert steps(home) == [2, 4]
    before = contents(home)
    other = tiny_run(shared(tmp_path), length=4, seed=7, run_dir=tmp_path / "y" / "r")
    assert f"the checkpoints in {home} belong to another run and are ignored" in caplog.text
    assert_same_weights(other, tiny_run(length=4, seed=7, run_dir=tmp_path / "alone"))
    assert steps(tmp_path / "store" / "r" / run_id(other)) == [2, 4]
    assert contents(home) == before
    for seed, name in {1337: "x", 7: "y"}.items():
        trace = Recorder()
        longer = tiny_run(
            shared(tmp_path), length=6, seed=seed, run_dir=tmp_path / name / "r", trace=trace
        )
        assert trace.names.count("on_step_start") == 2
        assert_same_weights(longer, tiny_run(length=6, seed=seed, run_dir=tmp_path / f"{name}6"))


def test_a_run_whose_folder_was_lost_continues_once_its_id_is_written(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    run = tiny_run(shared(tmp_path), length=4)
    known = run_id(run)
    shutil.rmtree(run.folder)
    run.folder.mkdir()
    (run.folder / "run-id").write_text(known)
    trace = Recorder()
    tiny_run(shared(tmp_path), length=6, trace=trace)
    assert trace.names.count("on_step_start") == 2


def test_the_id_is_made_once_and_is_that_of_every_checkpoint(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    run = tiny_run(Checkpoint(every=Period(2)), length=4)
    first = run_id(run)
    tiny_run(Checkpoint(every=Period(2)), length=6)
    assert run_id(run) == first
    assert {m.run for m in directory.sound(run.folder / "checkpoints")} == {first}
    again = tiny_run(Checkpoint(every=Period(2)), length=4, run_dir=tmp_path / "again")
    assert run_id(again) != first


def test_a_folder_without_an_id_adopts_the_checkpoints_in_it(tiny_run: TinyRun) -> None:
    run = tiny_run(Checkpoint(every=Period(2)), length=4)
    known = run_id(run)
    (run.folder / "run-id").unlink()
    (run.folder / ".run-id").write_text("what a process left that was killed while writing it")
    trace = Recorder()
    tiny_run(Checkpoint(every=Period(2)), length=6, trace=trace)
    assert trace.names.count("on_step_start") == 2
    assert run_id(run) == known
    assert not (run.folder / ".run-id").exists()


@pytest.mark.parametrize("text", ["", "../../other", "\xff\xfe", "0" * 65])
def test_an_invalid_id_is_reported(text: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run-id").write_text(text)
    with pytest.raises(StorageError, match=r"run/run-id: is not the id of a run"):
        tiny_run(shared(tmp_path), length=2)


# Checkpoints of two runs in one folder, as only a person can bring them together.

MINE, THEIRS = "a" * 12, "b" * 12


def publish(home: Path, step: int, run: str) -> Manifest:
    snapshot = {"model": {"w": torch.full((2,), float(step))}, "optimizer": {}, "progress": {}}
    metrics = {"val/loss": float(step)}
    facts = Manifest(step=step, run=run, created=0.0, settings="", data="", metrics=metrics)
    return publishing.publish(home, snapshots.pack(snapshot), facts)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    for step in range(1, 9):
        publish(tmp_path / "home", step, THEIRS if step in {1, 2, 8} else MINE)
    return tmp_path / "home"


@pytest.mark.parametrize(("wish", "step"), [(None, 7), ("latest", 7), ("best", 3), ("step-4", 4)])
def test_checkpoints_of_another_run_are_never_loaded(
    wish: str | None, step: int, mixed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load(mixed, wish, MINE)
    assert loaded is not None
    assert loaded.manifest.step == step
    (warning,) = [record.getMessage() for record in caplog.records]
    assert f"3 checkpoints of another run than {MINE} are ignored, among them {mixed}/" in warning


def test_a_checkpoint_of_another_run_is_not_loaded_by_name(mixed: Path) -> None:
    with pytest.raises(
        StorageError, match=r"there is no checkpoint 'step-8' \(checkpoints: step-0"
    ):
        load(mixed, "step-8", MINE)


def test_if_all_checkpoints_are_of_another_run_none_is_loaded(tmp_path: Path) -> None:
    publish(tmp_path / "home", 1, THEIRS)
    assert load(tmp_path / "home", None, MINE) is None


def test_retention_neither_counts_nor_deletes_checkpoints_of_another_run(mixed: Path) -> None:
    rules = Rules(keep_last=2, keep_best=1, monitor="val/loss")
    directory.prune(mixed, directory.sound(mixed, MINE), rules)
    assert steps(mixed) == [1, 2, 3, 6, 7, 8]


def test_a_checkpoint_of_another_run_is_never_overwritten(mixed: Path) -> None:
    before = contents(mixed)
    with pytest.raises(StorageError, match=r"step-00000002 is a checkpoint of another run"):
        publish(mixed, 2, MINE)
    assert contents(mixed) == before


def test_a_later_checkpoint_of_another_run_is_an_error_before_the_first_step(
    mixed: Path, tiny_run: TinyRun, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run-id").write_text("c" * 12)
    shutil.copytree(mixed, run / "checkpoints")
    before, trace = contents(mixed), Recorder()
    with pytest.raises(
        StorageError, match=r"step-00000008 is a checkpoint of another run than ccc"
    ):
        directory.supersede(run / "checkpoints", 4, "c" * 12)
    with pytest.raises(FundamentalError, match="checkpoint"):
        tiny_run(Checkpoint(every=Period(2)), length=4, trace=trace)
    assert "on_step_start" not in trace.names
    assert contents(run / "checkpoints") == before


def test_checkpoints_of_another_run_are_not_moved_away(mixed: Path) -> None:
    before = contents(mixed)
    directory.supersede(mixed, 8, MINE)
    assert contents(mixed) == before
    shutil.rmtree(mixed / "step-00000008")
    directory.supersede(mixed, 5, MINE)
    assert steps(mixed) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("before", "after"),
    [("here", "far"), ("far", "here"), ("far", "near"), ("far", "renamed"), ("here", "renamed")],
)
def test_a_run_resumes_although_its_settings_name_another_folder(
    before: str, after: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    tables = {
        "here": {"checkpoint": KEPT},
        "far": {"checkpoint": KEPT | {"folder": str(tmp_path / "far")}},
        "near": {"checkpoint": KEPT | {"folder": str(tmp_path / "near")}},
        "renamed": {"mine": KEPT | {"plugin": "checkpoint"}},
    }

    def goes_on(which: str, length: int) -> Recorder:
        trace = Recorder()
        tiny_run(*tables[which], settings=tables[which], length=length, trace=trace)
        return trace

    goes_on(before, 4)
    assert goes_on(after, 5).names.count("on_step_start") == 1
    # Nothing new is saved before step 6 by one that is killed: the former place is still known.
    for home in tmp_path.rglob("step-00000005"):
        shutil.rmtree(home)
    assert goes_on(after, 6).names.count("on_step_start") == 2
    assert goes_on(before, 7).names.count("on_step_start") == 1


def test_checkpoints_in_a_former_folder_are_listed_and_moved_away(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    @plugin
    class Asks:
        @hookimpl
        def on_run_start(self, run: Run) -> None:
            run.wanted_checkpoint = "step-2"

    run = tiny_run(shared(tmp_path), length=4)
    home = tmp_path / "store" / "run" / run_id(run)
    tiny_run(Checkpoint(every=Period(2)), length=4)
    assert {row.name for row in rows(run.folder, verify=False)} >= {f"{home}/step-00000004"}
    tiny_run(Checkpoint(every=Period(3)), Asks(), length=3)
    assert steps(home) == [2]
    (aside,) = home.glob("superseded-*")
    assert steps(aside) == [4]


def test_a_name_that_several_folders_have_is_listed_once(tiny_run: TinyRun) -> None:
    @plugin
    class Asks:
        @hookimpl
        def on_run_start(self, run: Run) -> None:
            run.wanted_checkpoint = "foo"

    tables = {"checkpoint": KEPT, "archive": KEPT | {"plugin": "checkpoint"}}
    tiny_run(*tables, settings=tables, length=4)
    said = r"no checkpoint 'foo' \(checkpoints: step-00000004, step-00000002\)"
    with pytest.raises(StorageError, match=said):
        tiny_run(*tables, Asks(), settings=tables, length=4)
