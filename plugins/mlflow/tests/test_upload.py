"""From journals to a real sqlite store, without a training process: what ends up in it."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fundamentallm_mlflow import Mlflow
from fundamentallm_mlflow.child import Worker
from fundamentallm_mlflow.journal import Journal, JournalReader
from fundamentallm_mlflow.sync_state import SyncState
from fundamentallm_mlflow.tracking_uri import absolute, charts, masked, recorded_uri, store_of
from fundamentallm_mlflow.worker import system_metrics
from fundamentallm_mlflow.worker.session import FolderLock, Session
from fundamentallm_mlflow.worker.sync import Sync

START: dict[str, Any] = {
    "step": 0,
    "resume": "auto",
    "chose_checkpoint": False,
    "name": "r",
    "records": [],
    "tags": {},
    "parameters": {"groups.*bias.lr": "1", "run.length": "8 steps"},
    "dataset": {"name": "d", "digest": "1", "source": {}, "profile": {"tokens": 5}},
}


class Process:
    """What a training process would write."""

    count = 0

    def __init__(self, folder: Path, **facts: Any) -> None:
        Process.count += 1
        self.journal = Journal(folder / "journal.jsonl")
        self.step = facts.get("step", 0)
        self.journal.append("start", **START | {"id": f"{Process.count:032x}"} | facts)

    def trains(self, until: int, scale: float = 1.0) -> Process:
        for step in range(self.step + 1, until + 1):
            self.journal.append("metrics", step=step, metrics={"train/loss": scale / step})
        self.step = max(self.step, until)
        return self

    def ends(self, outcome: str | None = "finished") -> None:
        if outcome is not None:
            self.journal.append("end", outcome=outcome, error=None)
        self.journal.close()


def opened(uri: str, experiment: str) -> Any:
    from fundamentallm_mlflow.worker.client import Client

    return Client(uri, experiment)


def upload(folder: Path, store: Any, experiment: str) -> str:
    one = Sync(folder, store.uri, experiment, store)
    one.upload()
    one.close()
    return one.run.run_id


def losses(steps: range, scale: float = 1.0) -> list[tuple[int, float]]:
    return [(step, scale / step) for step in steps]


def test_a_run_that_is_killed_and_resumed_has_each_step_once(look: Any, tmp_path: Path) -> None:
    Process(tmp_path).trains(6).ends(None)
    first = upload(tmp_path, opened(look.uri, "killed"), "killed")
    kept = look.run("killed")
    assert (kept.info.status, kept.data.tags["outcome"]) == ("FAILED", "killed")
    Process(tmp_path, step=4).trains(9).ends()
    assert upload(tmp_path, opened(look.uri, "killed"), "killed") == first
    kept = look.run("killed")
    assert (kept.info.status, kept.data.tags["outcome"]) == ("FINISHED", "finished")
    assert "error" not in kept.data.tags
    assert look.points(kept, "train/loss") == losses(range(1, 10))


@given(data=st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_wherever_processes_die_every_row_is_there_once(look: Any, data: st.DataObject) -> None:
    """Both may: the one that trains, after any row, and the one that ships, at any call."""
    from fundamentallm_mlflow.worker import sync
    from fundamentallm_mlflow.worker.client import Client

    class Dying(Client):
        calls = 1 << 30
        after = False

        def take(self, run_id: str, points: Any) -> None:
            self.calls -= 1
            if self.calls == 0 and not self.after:
                raise KeyboardInterrupt
            super().take(run_id, points)
            if self.calls == 0:
                raise KeyboardInterrupt

    before, sync.BATCH_POINTS = sync.BATCH_POINTS, 3
    try:
        with tempfile.TemporaryDirectory() as name:
            folder, reached = Path(name), 0
            for _ in range(data.draw(st.integers(1, 3), label="processes")):
                start = data.draw(st.integers(0, reached), label="start")
                reached = max(reached, data.draw(st.integers(start, start + 8), label="death"))
                Process(folder, step=start).trains(reached).ends(
                    data.draw(st.sampled_from([None, "interrupted"]))
                )
                store = Dying(look.uri, "anywhere")
                store.calls = data.draw(st.integers(1, 4), label="calls")
                store.after = data.draw(st.booleans(), label="after")
                with contextlib.suppress(KeyboardInterrupt):
                    upload(folder, store, "anywhere")
            run_id = upload(folder, Client(look.uri, "anywhere"), "anywhere")
            assert look.points(run_id, "train/loss") == losses(range(1, reached + 1))
            assert len(SyncState(folder).runs) == 1
    finally:
        sync.BATCH_POINTS = before


def test_an_older_checkpoint_forks_a_run_with_the_history_up_to_its_step(
    look: Any, tmp_path: Path
) -> None:
    first = Process(tmp_path).trains(4)
    first.journal.append("checkpoint", step=4, folder="/nowhere/step-00000004")
    first.trains(8).journal.append("checkpoint", step=8, folder="/nowhere/step-00000008")
    first.ends()
    upload(tmp_path, opened(look.uri, "fork"), "fork")
    Process(tmp_path, step=4, chose_checkpoint=True).trains(6, scale=2.0).ends()
    fork = upload(tmp_path, opened(look.uri, "fork"), "fork")
    old = look.client.get_run(SyncState(tmp_path).runs[0].run_id)
    tags = look.client.get_run(fork).data.tags
    assert look.points(old, "train/loss") == losses(range(1, 9))
    assert look.points(fork, "train/loss") == losses(range(1, 5)) + losses(range(5, 7), 2.0)
    assert (tags["forked_from"], tags["forked_at"]) == (old.info.run_id, "4")
    assert tags["fork_reason"] == "continued from step 4, though step 8 was saved"
    # The newest checkpoint that belongs to the fork is the one of step 4.
    Process(tmp_path, step=4, chose_checkpoint=True).trains(7, scale=2.0).ends()
    assert upload(tmp_path, opened(look.uri, "fork"), "fork") == fork
    assert [step for step, _ in look.points(fork, "train/loss")] == list(range(1, 8))


@pytest.mark.parametrize(
    ("facts", "runs"),
    [
        ({}, 1),
        ({"parameters": START["parameters"] | {"run.length": "16 steps"}}, 1),
        ({"parameters": START["parameters"] | {"adamw.lr": "2"}}, 2),
        ({"parameters": START["parameters"] | {"adamw.lr": "2"}, "resume": "same"}, 1),
        ({"resume": "fork"}, 2),
    ],
)
def test_changed_settings_fork_unless_resume_decides_otherwise(
    look: Any, tmp_path: Path, facts: dict[str, Any], runs: int
) -> None:
    Process(tmp_path).trains(3).ends()
    upload(tmp_path, opened(look.uri, "changed"), "changed")
    Process(tmp_path, step=3, **facts).trains(4).ends()
    run = look.client.get_run(upload(tmp_path, opened(look.uri, "changed"), "changed"))
    assert len(SyncState(tmp_path).runs) == runs
    assert look.points(run, "train/loss") == losses(range(1, 5))
    if runs == 2 and "parameters" in facts:
        assert run.data.tags["fork_reason"] == "adamw.lr: not set -> 2"
    if runs == 1 and "parameters" in facts:
        assert "->" in run.data.tags.get("settings.changed", "->")


def test_a_new_run_has_no_history(look: Any, tmp_path: Path) -> None:
    Process(tmp_path).trains(3).ends()
    first = upload(tmp_path, opened(look.uri, "new"), "new")
    Process(tmp_path, step=3, resume="new").trains(5).ends()
    second = look.client.get_run(upload(tmp_path, opened(look.uri, "new"), "new"))
    assert second.data.tags["continues"] == first
    assert look.points(second, "train/loss") == losses(range(4, 6))


def test_the_remaining_rows_of_an_ended_process_go_to_its_own_run(
    look: Any, tmp_path: Path
) -> None:
    Process(tmp_path).trains(3).ends("interrupted")
    Process(tmp_path, step=2, resume="fork").trains(4, scale=2.0).ends()
    second = upload(tmp_path, opened(look.uri, "left"), "left")
    first, _ = SyncState(tmp_path).runs
    kept = look.client.get_run(first.run_id)
    assert kept.info.status == "KILLED"
    assert look.points(kept, "train/loss") == losses(range(1, 4))
    assert look.points(second, "train/loss") == losses(range(1, 3)) + losses(range(3, 5), 2.0)


def test_void_steps_are_tagged_and_not_doubled(look: Any, tmp_path: Path) -> None:
    process = Process(tmp_path).trains(6)
    process.journal.append("rewind", step=4, left=6)
    process.step = 4
    process.trains(8, scale=2.0).ends()
    upload(tmp_path, opened(look.uri, "rewound"), "rewound")
    kept = look.run("rewound")
    assert look.points(kept, "train/loss") == losses(range(1, 7)) + losses(range(7, 9), 2.0)
    assert kept.data.tags["rewind.6"] == "steps 5 to 6 are void: the run went back"


def test_a_checkpoint_is_a_model_with_the_metrics_of_its_step(look: Any, tmp_path: Path) -> None:
    process = Process(tmp_path).trains(2)
    process.journal.append("metrics", step=4, metrics={"train/loss": 1.0, "val/loss": 2.0})
    process.journal.append("metrics", step=6, metrics={"val/loss": 1.5})
    process.journal.append("checkpoint", step=4, folder="/nowhere/step-00000004")
    process.ends()
    run_id = upload(tmp_path, opened(look.uri, "models"), "models")
    (model,) = look.client.search_logged_models([look.run("models").info.experiment_id])
    assert (model.name, model.source_run_id) == ("step-00000004", run_id)
    assert model.tags["path"] == "/nowhere/step-00000004"
    assert [(m.key, m.value, m.step) for m in model.metrics] == [("val/loss", 2.0, 4)]
    assert look.points(run_id, "val/loss") == [(4, 2.0), (6, 1.5)]


def test_a_run_that_was_deleted_gets_a_new_one_with_all_rows(look: Any, tmp_path: Path) -> None:
    Process(tmp_path).trains(3).ends()
    first = upload(tmp_path, opened(look.uri, "gone"), "gone")
    look.client.delete_run(first)
    Process(tmp_path, step=3).trains(5).ends()
    second = upload(tmp_path, opened(look.uri, "gone"), "gone")
    assert second != first
    assert look.points(second, "train/loss") == losses(range(1, 6))


@pytest.fixture(scope="session")
def second(tmp_path_factory: pytest.TempPathFactory, look: Any) -> Any:
    """Another store, which takes seconds to make."""
    return type(look)(f"sqlite:///{tmp_path_factory.mktemp('second') / 'other.db'}")


def test_a_second_store_gets_all_of_a_run_that_the_first_one_has(
    look: Any, second: Any, tmp_path: Path
) -> None:
    process = Process(tmp_path).trains(4)
    process.journal.append("checkpoint", step=4, folder="/nowhere/step-00000004")
    process.ends(None)
    Process(tmp_path, step=2).trains(6).ends()
    first = upload(tmp_path, opened(look.uri, "moved"), "moved")
    for _ in range(2):  # the second time there is nothing left to do
        there = upload(tmp_path, opened(second.uri, "moved"), "moved")
        kept = second.run("moved")
        assert (kept.info.run_id, kept.info.status) == (there, "FINISHED")
        assert second.points(kept, "train/loss") == losses(range(1, 7))
        (model,) = second.client.search_logged_models([kept.info.experiment_id])
        assert model.name == "step-00000004"
        assert kept.data.params["run.length"] == "8 steps"
    # And back: what is trained on goes on in the run that the first store has.
    Process(tmp_path, step=6).trains(8).ends()
    assert upload(tmp_path, opened(look.uri, "moved"), "moved") == first
    assert look.points(look.run("moved"), "train/loss") == losses(range(1, 9))
    assert upload(tmp_path, opened(second.uri, "moved"), "moved") == there
    assert second.points(second.run("moved"), "train/loss") == losses(range(1, 9))
    assert {run.info.status for run in (look.run("moved"), second.run("moved"))} == {"FINISHED"}


def test_a_deleted_run_is_uploaded_again_though_it_was_complete(look: Any, tmp_path: Path) -> None:
    Process(tmp_path).trains(3).ends()
    first = upload(tmp_path, opened(look.uri, "again"), "again")
    look.client.delete_run(first)
    assert upload(tmp_path, opened(look.uri, "again"), "again") != first
    assert look.points(look.run("again"), "train/loss") == losses(range(1, 4))


@pytest.mark.parametrize("is_orphan", [True, False])
def test_a_worker_whose_training_process_died_yields_the_lock_to_another(
    look: Any, tmp_path: Path, *, is_orphan: bool
) -> None:
    own = Mlflow(end_seconds=300.0, on_start_failure="journal", start_seconds=600.0)
    asked = own.request(tmp_path, "http://127.0.0.1:9")
    before = Worker(tmp_path, asked | ({"training_pid": 1} if is_orphan else {}))
    assert "error" in before.wait_open()
    before.begin_upload()
    pid = int((tmp_path / ".lock").read_text())
    lock = FolderLock(tmp_path, os.getpid())
    if is_orphan:
        lock.acquire(300.0)
        assert "another process uploads the rest" in (tmp_path / "worker.log").read_text()
    else:
        with pytest.raises(TimeoutError, match=rf"still uploads this run \(pid {pid}\)"):
            lock.acquire(0.5)
        before.kill()
        lock.acquire(60.0)
    before.kill()
    assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_lost_sync_state_is_rebuilt_without_doubled_runs_or_points(
    look: Any, tmp_path: Path
) -> None:
    Process(tmp_path).trains(3).ends()
    first = upload(tmp_path, opened(look.uri, "lost"), "lost")
    (tmp_path / "runs.json").unlink()
    assert upload(tmp_path, opened(look.uri, "lost"), "lost") == first
    assert look.points(look.run("lost"), "train/loss") == losses(range(1, 4))


def test_a_refused_metric_does_not_affect_the_others_in_its_batch(look: Any) -> None:
    store = opened(look.uri, "refused")
    run_id = store.run_for(START | {"id": "refused", "time": 1})
    store.describe(run_id, START, {})
    good = [(f"m/{i}", float(i), 1, 1) for i in range(20)]
    refused = ("m/bad", 1.0, -1, 1)
    store.take(run_id, [*good[:7], refused, *good[7:], ("odd//name(x)", math.inf, 1, 1)])
    kept = look.run("refused")
    assert {k: v for k, v in kept.data.metrics.items() if k.startswith("m/")} == {
        key: value for key, value, _, _ in good
    }
    assert math.isnan(kept.data.metrics["odd/name_x_"])
    assert kept.data.params == {"groups._bias.lr": "1", "run.length": "8 steps"}


def test_a_description_that_is_refused_in_parts_is_logged_without_them(look: Any) -> None:
    from mlflow.entities import Param

    store = opened(look.uri, "described")
    source = {"paths": ["/data/part"] * 10_000, "fingerprint": "f"}
    start = START | {
        "id": "described",
        "time": 1,
        "name": "n" * 300,
        "parameters": {"a": "1", "x" * 300: "2", "x" * 301: "3", "a(b)": "4", "a_b_": "5"},
        "tags": {"mine": "1", "t" * 300: "2", "mlflow.runName": "n", "long": "v" * 10_000},
        "dataset": START["dataset"] | {"source": source},
    }
    run_id = store.run_for(start)
    store.describe(run_id, start, {})
    kept = look.run("described")
    assert sorted(kept.data.params.values()) == ["1", "2", "3", "4", "5"]
    assert max(len(key) for key in kept.data.params) == 250
    assert kept.data.params["a_b_"] == "4"
    assert kept.data.tags["mine"] == "1"
    assert [v for k, v in kept.data.tags.items() if k.startswith("ttt")] == ["2"]
    (data,) = kept.inputs.dataset_inputs
    assert json.loads(data.dataset.source)["fingerprint"] == "f"
    store._send(run_id, [Param("p/1", "1"), Param("a", "other"), Param("p/2", "2")], 100, "params")
    kept = look.run("described")
    assert {"p/1", "p/2"} <= set(kept.data.params)
    assert kept.data.params["a"] == "1"


def test_two_metrics_with_one_safe_name_stay_two(look: Any, tmp_path: Path) -> None:
    process = Process(tmp_path)
    long = ["m/" + "x" * 300 + end for end in "ab"]
    for step in (1, 2):
        metrics = {name: float(n) for n, name in enumerate(["bad(x)", "bad_x_", *long])}
        process.journal.append("metrics", step=step, metrics=metrics)
        if step == 1:
            upload(tmp_path, opened(look.uri, "names"), "names")  # and on by another process
    process.ends()
    run_id = upload(tmp_path, opened(look.uri, "names"), "names")
    found = look.run("names").data.metrics
    assert sorted(found.values()) == [0.0, 1.0, 2.0, 3.0]
    assert found["bad_x_"] == 0.0
    for name, value in found.items():
        assert look.points(run_id, name) == [(1, value), (2, value)]


def test_a_model_that_was_half_logged_is_completed(look: Any, tmp_path: Path) -> None:
    from fundamentallm_mlflow.worker.client import Client

    class Dying(Client):
        def accepted(self, call: Any, *given: Any, **named: Any) -> bool:
            if "model_id" in named:
                raise KeyboardInterrupt
            return super().accepted(call, *given, **named)

    process = Process(tmp_path)
    saves(process, tmp_path, 2.0)
    process.ends()
    with pytest.raises(KeyboardInterrupt):
        upload(tmp_path, Dying(look.uri, "half"), "half")
    for _ in range(2):
        upload(tmp_path, opened(look.uri, "half"), "half")
        (model,) = look.client.search_logged_models([look.run("half").info.experiment_id])
        assert [(m.key, m.value) for m in model.metrics] == [("val/loss", 2.0)]
        assert model.status == "READY"
        assert len(look.run("half").outputs.model_outputs) == 1


def test_files_of_checkpoints_are_uploaded_if_the_setting_is_on(
    look: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    from fundamentallm_mlflow.worker.client import MlflowClient

    process = Process(tmp_path, upload=True)
    for _ in range(3):
        saves(process, tmp_path, 1.0)
        (folder := tmp_path / "checkpoints" / f"step-{process.step:08d}").mkdir(exist_ok=True)
        (folder / "weights").write_text(str(process.step))
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
    real = MlflowClient.log_artifacts

    def slow(self: Any, run_id: str, path: str, to: str | None = None) -> None:
        if path.endswith("2"):  # it is deleted while it is copied
            shutil.rmtree(path)
            raise FileNotFoundError(path)
        real(self, run_id, path, to)

    monkeypatch.setattr(MlflowClient, "log_artifacts", slow)
    process.ends()
    upload(tmp_path, opened(look.uri, "files"), "files")
    kept = look.run("files")
    assert kept.info.status == "FINISHED"
    assert "checkpoints/step-00000003" in look.files(kept, "checkpoints")
    there = look.files(kept, "checkpoints/step-00000003")
    assert there == {"checkpoints/step-00000003/weights"}


def test_system_metrics_have_the_names_that_mlflow_looks_for(look: Any, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step-00000004.txt").write_text("a sample")
    Process(tmp_path).trains(3).ends()
    asked = {"uri": look.uri, "masked_uri": look.uri, "experiment": "system", "plot": True}
    machine = {"training_pid": 1, "system_seconds": 5.0, "run_folder": str(tmp_path)}
    work = Session(asked | machine, tmp_path)
    work.attach()
    work.measure()
    work.upload()
    work.end()
    kept = look.run("system")
    found = {"system/cpu_utilization_percentage", "system/system_memory_usage_percentage"}
    assert found <= set(kept.data.metrics)
    assert look.files(kept) == {"loss.png", "samples"}
    assert look.files(kept, "samples") == {"samples/step-00000004.txt"}


def machine(folder: Path, uri: str, experiment: str, seconds: float = 0.0) -> Session:
    """What ships ``folder``, and looks at this process, if ``seconds`` say so."""
    asked = {"uri": uri, "masked_uri": uri, "experiment": experiment, "plot": False}
    return Session(
        asked
        | {
            "training_pid": os.getpid(),
            "system_seconds": seconds,
            "run_folder": str(folder),
            "start_seconds": 60.0,
        },
        folder,
    )


def seen(folder: Path) -> list[tuple[int, float]]:
    """Return what ``system.jsonl`` has of one metric."""
    rows = [row for _, row in JournalReader(folder / "system.jsonl").rows()]
    return [(row["step"], row["metrics"][MEMORY]) for row in rows]


MEMORY = "system/training_memory_megabytes"


def test_measurements_are_kept_without_a_store_and_go_into_every_store(
    look: Any, second: Any, tmp_path: Path
) -> None:
    process = Process(tmp_path).trains(3)
    away = machine(tmp_path, "http://127.0.0.1:9", "looks", 1e-4)
    for _ in range(5):
        away.measure()
        time.sleep(0.001)
    kept = seen(tmp_path)
    assert len(kept) == 5
    process.ends()
    for store in (look, second, second):
        work = machine(tmp_path, store.uri, "looks")
        work.upload()
        work.end()
        assert store.points(store.run("looks"), MEMORY) == kept
    # What is seen of a process that begins another MLflow run goes there.
    Process(tmp_path, step=3, resume="fork").trains(4).ends()
    fork = machine(tmp_path, look.uri, "looks", 1e-4)
    fork.measure()
    fork.upload()
    later = seen(tmp_path)[5:]
    first, last = (entry.run_id for entry in SyncState(tmp_path).runs[-2:])
    assert len(later) == 1
    assert look.points(fork.attach()["run_id"], MEMORY) == later
    assert look.points(look.runs("looks")[0], MEMORY) == kept
    assert first != last


WRONG = (
    {"step": "2"},
    {"step": None},
    {"start": None},
    {"time": "x"},
    {"metrics": [1]},
    {"metrics": None},
    {"metrics": {"system/a": "b"}},
)


def test_a_damaged_measurement_affects_no_other_row(look: Any, tmp_path: Path) -> None:
    Process(tmp_path).trains(3)
    machine(tmp_path, look.uri, "damaged", 1000.0).measure()
    path = tmp_path / "system.jsonl"
    row = json.loads(path.read_text())
    lines = [json.dumps(row | wrong) for wrong in WRONG] + [json.dumps({"kind": "system"})]
    path.write_text("\n".join([*lines, json.dumps(row), ""]))
    work = machine(tmp_path, look.uri, "damaged", 1000.0)
    work.measure()
    work.upload()
    kept = look.run("damaged")
    assert [step for step, _ in look.points(kept, MEMORY)] == [row["step"], row["step"] + 1]
    assert len(look.points(kept, "train/loss")) == 3


def test_a_deleted_file_of_measurements_is_read_from_its_start(look: Any, tmp_path: Path) -> None:
    Process(tmp_path).trains(3)
    for _ in range(5):
        work = machine(tmp_path, look.uri, "fresh", 1000.0)
        work.measure()
    work.upload()
    (tmp_path / "system.jsonl").unlink()
    work = machine(tmp_path, look.uri, "fresh", 1e-9)
    work.measure()
    work.upload()
    assert set(seen(tmp_path)) <= set(look.points(look.run("fresh"), MEMORY))
    assert len(seen(tmp_path)) == 1


def test_a_machine_that_cannot_be_measured_stops_no_upload(
    look: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pid: int) -> dict[str, float]:
        raise ZeroDivisionError(pid)

    monkeypatch.setattr(system_metrics, "_host", fail)
    Process(tmp_path).trains(3)
    work = machine(tmp_path, look.uri, "unseen", 1000.0)
    for _ in range(2):
        work.measure()
    work.upload()
    assert len(look.points(look.run("unseen"), "train/loss")) == 3


def test_messages_of_nvidia_smi_are_no_measurements() -> None:
    assert system_metrics._device("No devices were found") == []
    assert system_metrics._device("0, 12, 100, 1000, [N/A]")[0] == (
        "gpu_0_utilization_percentage",
        12.0,
    )


def test_an_incomplete_measurement_affects_no_other_and_no_step_is_doubled(
    look: Any, tmp_path: Path
) -> None:
    Process(tmp_path).trains(3).ends()
    path = tmp_path / "system.jsonl"
    for _ in range(4):
        machine(tmp_path, look.uri, "torn", 1000.0).measure()
    os.truncate(path, path.stat().st_size - 9)
    machine(tmp_path, look.uri, "torn", 1000.0).measure()
    assert [step for step, _ in seen(tmp_path)] == [0, 1, 2, 3]
    with path.open("ab") as file:
        file.write(b'{"kind": "system", "time": 1, "st')  # the process was killed here
    work = machine(tmp_path, look.uri, "torn")
    work.upload()
    assert look.points(look.run("torn"), MEMORY) == seen(tmp_path)
    work = machine(tmp_path, look.uri, "torn", 1000.0)
    work.measure()
    work.upload()
    assert [step for step, _ in seen(tmp_path)] == [0, 1, 2, 3, 4]
    assert look.points(look.run("torn"), MEMORY) == seen(tmp_path)


def test_no_measurement_is_lost_or_doubled_wherever_the_worker_dies(
    look: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    from fundamentallm_mlflow.worker.client import Client

    Process(tmp_path).trains(3).ends()
    work = machine(tmp_path, look.uri, "dies", 1e-4)
    for _ in range(6):
        work.measure()
        time.sleep(0.001)
    monkeypatch.setattr("fundamentallm_mlflow.worker.sync.BATCH_POINTS", 8)  # two looks
    real, calls = Client.take, []

    def dying(self: Any, run_id: str, points: Any) -> None:
        calls.append(len(points))
        real(self, run_id, points)
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Client, "take", dying)
    for _ in range(9):
        with contextlib.suppress(KeyboardInterrupt):
            machine(tmp_path, look.uri, "dies").upload()
    assert max(calls) <= 12
    assert look.points(look.run("dies"), MEMORY) == seen(tmp_path)
    assert SyncState(tmp_path).runs[0].system_uploaded == (tmp_path / "system.jsonl").stat().st_size


@pytest.mark.parametrize("is_there", [True, False])
def test_a_full_disk_ends_the_measurements_and_not_the_upload(
    look: Any, tmp_path: Path, monkeypatch: Any, *, is_there: bool
) -> None:
    def full(*given: Any, **facts: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    name = f"no room {is_there}"
    Process(tmp_path).trains(3).ends()
    if is_there:
        monkeypatch.setattr(Journal, "append", full)
    else:
        (tmp_path / "system.jsonl").mkdir()
    work = machine(tmp_path, look.uri, name, 1e-4)
    for _ in range(2):
        work.measure()
        work.upload()
    assert look.points(look.run(name), "train/loss") == losses(range(1, 4))
    assert look.points(look.run(name), MEMORY) == []


def test_a_worker_without_the_lock_neither_opens_nor_measures_nor_uploads(
    look: Any, tmp_path: Path
) -> None:
    Process(tmp_path).trains(3).ends()
    first, then = FolderLock(tmp_path, os.getpid()), FolderLock(tmp_path, os.getpid())
    first.acquire(1.0)
    work = machine(tmp_path, look.uri, "turns", 1e-4)
    work._lock, work._request["start_seconds"] = then, 0.0
    for part in (work.open, work.measure, work.upload):
        with pytest.raises(TimeoutError, match="still uploads this run"):
            part()
    assert not (tmp_path / "system.jsonl").exists()
    first.__exit__()
    work.upload()
    assert look.points(look.run("turns"), "train/loss") == losses(range(1, 4))


def test_a_gpu_that_reports_some_values_is_logged_with_those() -> None:
    from fundamentallm_mlflow.worker.system_metrics import _device

    assert dict(_device("1, 50, 1000, 4000, [N/A]")) == {
        "gpu_1_utilization_percentage": 50.0,
        "gpu_1_memory_usage_megabytes": 1048.576,
        "gpu_1_memory_usage_percentage": 25.0,
    }
    assert dict(_device("0, [N/A], [N/A], [N/A], 71.25")) == {"gpu_0_power_usage_watts": 71.25}


@pytest.mark.slow
def test_two_runs_may_start_on_one_new_database(look: Any, tmp_path: Path) -> None:
    fresh = f"sqlite:///{tmp_path / 'fresh.db'}"
    code = (
        "import sys\n"
        "from fundamentallm_mlflow.worker.client import Client\n"
        "store = Client(sys.argv[1], 'shared')\n"
        "run_id = store.run_for({'id': sys.argv[2], 'time': 1, 'name': 'r'})\n"
        "store.end(run_id, {'outcome': 'finished'})\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, fresh, name]) for name in "ab"]
    assert [one.wait() for one in both] == [0, 0]
    runs = type(look)(fresh).runs("shared")
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]


def test_a_folder_that_cannot_hold_a_database_is_an_error_at_once() -> None:
    with pytest.raises(OSError, match="/proc/no"):
        opened("sqlite:////proc/no/mlflow.db", "x")


def test_a_deleted_experiment_is_an_error_that_names_the_deletion(look: Any) -> None:
    look.client.delete_experiment(look.client.create_experiment("deleted"))
    with pytest.raises(ValueError, match="'deleted' is deleted in the store: restore it"):
        opened(look.uri, "deleted")


def test_the_uri_of_a_database_is_absolute(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert absolute(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute("sqlite:///a/b.db") == f"sqlite:///{tmp_path}/a/b.db"
    assert absolute("sqlite:////x/b.db") == "sqlite:////x/b.db"
    assert absolute("http://host:5000") == "http://host:5000"


def test_a_run_stays_in_its_store_from_whatever_folder_it_is_resumed(
    monkeypatch: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("here", "else"):
        (tmp_path / name).mkdir()
    here, elsewhere = tmp_path / "here", tmp_path / "else"
    monkeypatch.chdir(here)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for number, asked in enumerate([None, "sqlite:///a.db", "http://me:secret@host"]):
        run = here / str(number)
        assert store_of(asked, run) == absolute(asked)
        Process(run, **recorded_uri(asked, absolute(asked))).ends()
        assert "secret" not in (run / "journal.jsonl").read_text()
    monkeypatch.chdir(elsewhere)
    assert store_of(None, here / "0") == f"sqlite:///{here}/mlflow.db"
    assert store_of("sqlite:///a.db", here / "1") == f"sqlite:///{here}/a.db"
    assert store_of("http://me:secret@host", here / "2") == "http://me:secret@host"
    assert store_of(None, here / "2") == "http://me@host"
    assert caplog.text == ""
    assert store_of("sqlite:///b.db", here / "1") == f"sqlite:///{elsewhere}/b.db"
    said = f"the store of this run is now sqlite:///{elsewhere}/b.db; it was sqlite:///{here}/a.db"
    assert said in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other")
    assert store_of(None, here / "0") == "http://other"
    assert "is now http://other" in caplog.text


def test_no_message_and_no_url_shows_a_password() -> None:
    assert masked("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert masked("http://host:5000") == "http://host:5000"
    assert charts("https://me:secret@host/x/", "7").startswith("https://host/x/#/experiments/7/")


def test_a_damaged_sync_state_is_treated_as_missing(tmp_path: Path) -> None:
    for text in ("", "{", json.dumps({"run_id": 1})):
        (tmp_path / "runs.json").write_text(text)
        assert SyncState(tmp_path).runs == []


def saves(process: Process, folder: Path, loss: float) -> None:
    """Write a row with a validation, and a checkpoint of it that is there."""
    process.step += 1
    process.journal.append("metrics", step=process.step, metrics={"val/loss": loss})
    checkpoint = folder / "checkpoints" / f"step-{process.step:08d}"
    checkpoint.mkdir(parents=True)
    process.journal.append("checkpoint", step=process.step, folder=str(checkpoint))


def registered(folder: Path, uri: str, values: list[float], mode: str = "min") -> str:
    process = Process(folder, registry={"name": "poet", "monitor": "val/loss", "mode": mode})
    for value in values:
        saves(process, folder, value)
    process.ends()
    return upload(folder, opened(uri, "registry"), "registry")


def test_the_best_remaining_checkpoint_is_a_version_and_the_best_of_all_runs_has_the_alias(
    look: Any, tmp_path: Path
) -> None:
    def best() -> tuple[str, str]:
        version = look.client.get_model_version_by_alias("poet", "best")
        return version.run_id, version.tags["val/loss"]

    first = registered(tmp_path / "1", look.uri, [3.0, 2.0, 2.5])
    assert best() == (first, "2.0")
    registered(tmp_path / "2", look.uri, [4.0, 2.25])
    assert best() == (first, "2.0")
    third = registered(tmp_path / "3", look.uri, [1.5, math.nan, 5.0])
    assert best() == (third, "1.5")
    versions = look.client.search_model_versions("name = 'poet'")
    assert sorted(one.tags["val/loss"] for one in versions) == ["1.5", "2.0", "2.25"]
    paths = {one.tags["path"] for one in versions}
    assert str(tmp_path / "1" / "checkpoints" / "step-00000002") in paths
    models = [look.client.get_logged_model(one.tags["model_id"]) for one in versions]
    assert {model.tags["path"] for model in models} == paths
    # Once more, as after an answer that got lost; and where the best was deleted meanwhile.
    upload(tmp_path / "1", opened(look.uri, "registry"), "registry")
    assert len(look.client.search_model_versions("name = 'poet'")) == 3
    (tmp_path / "3" / "checkpoints" / "step-00000001").rmdir()
    upload(tmp_path / "3", opened(look.uri, "registry"), "registry")
    assert best() == (third, "1.5")
    assert len(look.client.search_model_versions("name = 'poet'")) == 4


def test_a_run_without_a_checkpoint_registers_nothing(look: Any, tmp_path: Path) -> None:
    process = Process(
        tmp_path, registry={"name": "unmeasured", "monitor": "val/loss", "mode": "min"}
    )
    process.trains(3).ends()
    upload(tmp_path, opened(look.uri, "unmeasured"), "unmeasured")
    assert look.client.search_model_versions("name = 'unmeasured'") == []


def test_runs_of_one_parent_are_its_children_and_it_ends_with_the_last_of_them(
    look: Any, tmp_path: Path
) -> None:
    both = [Process(tmp_path / name, parent="sweep").trains(2) for name in "ab"]
    store = opened(look.uri, "sweeps")
    syncs = [Sync(tmp_path / name, look.uri, "sweeps", store) for name in "ab"]
    (parent,) = [run for run in look.runs("sweeps") if run.info.run_name == "sweep"]
    for process, one, status in zip(both, syncs, ("RUNNING", "FINISHED"), strict=True):
        assert look.client.get_run(parent.info.run_id).info.status == "RUNNING"
        process.ends()
        one.upload()
        one.close()
        child = look.client.get_run(one.run.run_id)
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert look.client.get_run(parent.info.run_id).info.status == status
    assert len(look.runs("sweeps")) == 3
    Process(tmp_path / "a", parent="sweep", step=2).trains(3).ends()
    Sync(tmp_path / "a", look.uri, "sweeps", store)
    assert look.client.get_run(parent.info.run_id).info.status == "RUNNING"
    assert len(look.runs("sweeps")) == 3


@pytest.mark.slow
def test_two_runs_that_start_at_once_have_one_parent(look: Any, started_together: Any) -> None:
    started_together(look.uri)
    parents = {run.data.tags.get("mlflow.parentRunId") for run in look.runs("together")}
    assert len(parents - {None}) == 1
    assert len(look.runs("together")) == 3
