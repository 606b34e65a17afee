"""Real runs into a real sqlite store, read back through MLflow's client."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import forked
import psutil
import pytest
from click.testing import CliRunner

from fundamentallm import (
    FundamentalError,
    PluginError,
    SettingsError,
    StorageError,
    hookimpl,
    plugin,
    state,
)
from fundamentallm.testing import PluginContract, Recorder, TinyRun, TwoProcesses
from fundamentallm_mlflow import Mlflow
from fundamentallm_mlflow.child import FinalWait, Worker
from fundamentallm_mlflow.cli import mlflow as command
from fundamentallm_mlflow.cli import ui
from fundamentallm_mlflow.description import tags
from fundamentallm_mlflow.journal import Journal
from fundamentallm_mlflow.sync_state import uploaded_bytes
from fundamentallm_mlflow.worker.__main__ import Commands, UploadLoop
from fundamentallm_mlflow.worker.session import explain

if TYPE_CHECKING:
    from fundamentallm import Run

PATIENT = {"start_seconds": 120.0, "end_seconds": 120.0, "plot": False}


def logger(experiment: str, **settings: Any) -> Mlflow:
    """Make the plugin, with patience for machines that have much else to do."""
    return Mlflow(experiment=experiment, **PATIENT | settings)


class TestContract(PluginContract):
    plugin = Mlflow
    # A store that does not exist: the contract does not depend on a store, and this is fast.
    needs = {
        "tracking_uri": "nonsense://x",
        "on_start_failure": "journal",
        **PATIENT,
        "end_seconds": 0.01,
    }


@plugin
class Ends:
    """Ends the training process in one of its steps."""

    step: int
    """Which."""
    by: str
    """How."""

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if run.progress.step == self.step:
            if self.by == "error":
                raise RuntimeError("broken on purpose")
            (run.folder / "mlflow_imported").write_text(str("mlflow" in sys.modules))
            os.kill(os.getpid(), getattr(signal, self.by))


@plugin
class Saves:
    """Reports a checkpoint at the end."""

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if run.ending:
            folder = run.folder / "checkpoints" / f"step-{run.progress.step:08d}"
            folder.mkdir(parents=True)
            run.hook.on_checkpoint_saved(run=run, folder=folder)


def test_the_wait_for_the_store_is_shown_as_progress(tiny_run: TinyRun) -> None:
    recorder = Recorder()
    tiny_run(logger("shown"), trace=recorder, length=1)
    reports = [given for hook, given in recorder.calls if hook == "on_progress"]
    (task,) = {given["task"] for given in reports if "opening" in given["task"]}
    ends = [(given["done"], given["total"]) for given in reports if given["task"] == task]
    assert ends == [(0, None), (1, 1)]


def test_the_store_has_all_data_of_a_run(
    look: Any, tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    parts = [logger("whole", tags={"purpose": "test"}), Saves()]
    run = tiny_run(*parts, length=6, validate_every=4)
    kept = look.run("whole")
    assert kept.info.status == "FINISHED"
    assert kept.info.run_name == run.name
    for key in ("train/loss", "optim/lr", "val/loss"):
        wanted = [(int(row["step"]), row[key]) for row in run.history if key in row]
        assert look.points(kept, key) == wanted
    assert kept.data.params["run.length"] == "6 steps"
    assert kept.data.params["tiny_model.dropout"] == "0.1"
    assert int(kept.data.params["model.parameters"]) == sum(p.numel() for p in run.parameters)
    assert not [key for key in kept.data.params if key.startswith("mlflow.")]
    tags = kept.data.tags
    assert tags["purpose"] == "test"
    assert {"version.torch", "version.fundamentallm", "host", "settings.sha256"} <= set(tags)
    assert (tags["outcome"], tags["device"], tags["world_size"]) == ("finished", "cpu", "1")
    assert look.files(kept) == {"settings.toml", "environment.json"}
    seen = (run.folder / "mlflow" / "system.jsonl").read_text().splitlines()
    for key in ("system/cpu_utilization_percentage", "system/training_memory_megabytes"):
        rows = [(row["step"], row["metrics"][key]) for row in map(json.loads, seen)]
        assert rows
        assert look.points(kept, key) == rows
    (data,) = kept.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("tiny_data", "tiny")
    (model,) = look.client.search_logged_models([kept.info.experiment_id])
    (metric,) = model.metrics
    assert (metric.key, metric.value) == ("val/loss", run.history[-1]["val/loss"])
    url = f"/#/experiments/{kept.info.experiment_id}/runs?workflowType=machine_learning&compare"
    assert caplog.text.count(url) == 2


SHOT = """
import sys
from fundamentallm import train
from fundamentallm.testing import tiny_parts
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("tests", {path!r})
tests = sys.modules["tests"] = module_from_spec(spec)
spec.loader.exec_module(tests)
parts = [tests.logger("ends"), tests.Ends(step=7, by="SIGKILL")]
settings = {{"run": {{"length": 8, "log_every": 2, "device": "cpu"}}}}
train(settings, plugins=[*parts, *tiny_parts(parts)], run_dir={folder!r})
"""


def test_a_run_that_ends_in_every_way_and_is_resumed_each_time_is_one_mlflow_run(
    look: Any, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """There is no checkpoint: each time all is trained once more, and nothing logged twice."""

    def steps() -> list[int]:
        return [step for step, _ in look.points(kept, "train/loss")]

    with pytest.raises(FundamentalError, match="broken on purpose"):
        tiny_run(logger("ends"), Ends(step=3, by="error"), length=8)
    kept = look.run("ends")
    assert (kept.info.status, kept.data.tags["outcome"], steps()) == ("FAILED", "failed", [2])
    assert "broken on purpose" in kept.data.tags["error"]

    tiny_run(logger("ends", resume="same"), Ends(step=5, by="SIGTERM"), length=8)
    kept = look.run("ends")
    assert (kept.info.status, kept.data.tags["outcome"]) == ("KILLED", "interrupted")
    assert steps() == [2, 4]
    assert "error" not in kept.data.tags

    code = SHOT.format(path=__file__, folder=str(tmp_path / "run"))
    code = code.replace('logger("ends")', 'logger("ends", resume="same")')
    shot = forked.run([sys.executable, "-c", code])
    assert shot.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "mlflow_imported").read_text() == "False"
    until = time.monotonic() + 60
    while look.run("ends").info.status == "RUNNING":
        assert time.monotonic() < until
        time.sleep(0.2)
    kept = look.run("ends")
    assert (kept.info.status, kept.data.tags["outcome"]) == ("FAILED", "killed")
    assert steps() == [2, 4, 6]

    last = tiny_run(logger("ends", resume="same"), length=10)
    kept = look.run("ends")
    assert (kept.info.status, kept.data.tags["outcome"]) == ("FINISHED", "finished")
    losses = [(int(row["step"]), row["train/loss"]) for row in last.history]
    assert look.points(kept, "train/loss") == losses
    assert kept.data.params["run.length"] == "8 steps"
    assert "run.length: 8 steps -> 10 steps" in kept.data.tags["settings.changed"]


def workers() -> list[psutil.Process]:
    """Return the processes that ship: others of this one may have children of their own here."""
    mine = [one for one in psutil.Process().children() if one.status() != "zombie"]
    return [one for one in mine if "fundamentallm_mlflow.worker" in one.cmdline()]


@plugin
class CountsWorkers:
    """Counts the workers of its process."""

    found: int = state(0)

    @hookimpl
    def on_step_end(self) -> None:
        self.found = len(workers())


def test_two_processes_are_one_run_with_one_worker(look: Any, two_processes: TwoProcesses) -> None:
    first, second = two_processes(logger("pair"), CountsWorkers(), length=6)
    assert [one.states["counts_workers"]["found"] for one in (first, second)] == [1, 0]
    kept = look.run("pair")
    assert (kept.info.status, kept.data.tags["world_size"]) == ("FINISHED", "2")
    losses = [(int(row["step"]), row["train/loss"]) for row in first.history]
    assert look.points(kept, "train/loss") == losses


@plugin
class Assassin:
    """Kills the worker, after some steps."""

    steps: Any
    """Which."""

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if run.progress.step in self.steps:
            (child,) = workers()
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)


@plugin
class Stopper:
    """Stops the worker, which then receives nothing."""

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        for child in workers():
            child.suspend()


def test_code_outside_git_has_no_tag_that_says_clean(tiny_run: TinyRun) -> None:
    run = tiny_run(length=1)
    path = run.folder / "environment.json"
    environment = json.loads(path.read_text())
    for commit, dirty, wanted in (
        (None, False, None),
        ("c1", False, "false"),
        ("c1", True, "true"),
    ):
        path.write_text(json.dumps(environment | {"git": {"commit": commit, "dirty": dirty}}))
        assert tags(run, {}, {"model.parameters": "1"}).get("git.dirty") == wanted


@pytest.mark.parametrize("steps", [(3,), (8,)])
def test_another_worker_takes_over_from_a_killed_one_and_no_row_is_lost(
    look: Any, tiny_run: TinyRun, caplog: pytest.LogCaptureFixture, steps: tuple[int, ...]
) -> None:
    one = logger(f"killed{steps}")
    run = tiny_run(one, Assassin(steps=steps), length=8, log_every=1, validate_every=4)
    kept = look.run(f"killed{steps}")
    assert kept.info.status == "FINISHED"
    for key in ("train/loss", "val/loss"):
        wanted = [(int(row["step"]), row[key]) for row in run.history if key in row]
        assert look.points(kept, key) == wanted
    assert caplog.text.count("was killed: another one takes over") == 1


@pytest.mark.slow
def test_a_worker_that_is_killed_four_times_is_not_restarted_and_sync_uploads_the_rest(
    look: Any, tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"mlflow": {"experiment": "hunted", **PATIENT}}
    hunter = Assassin(steps=range(2, 6))
    run = tiny_run("mlflow", hunter, settings=settings, length=8, log_every=1)
    assert caplog.text.count("was killed: another one takes over") == 3
    assert caplog.text.count("the upload worker ended: the rows wait in") == 1
    words = ["sync", str(run.folder)]
    CliRunner().invoke(command, words, catch_exceptions=False, standalone_mode=False)
    kept = look.run("hunted")
    assert kept.info.status == "FINISHED"
    wanted = [(int(row["step"]), row["train/loss"]) for row in run.history]
    assert look.points(kept, "train/loss") == wanted


def test_a_store_that_does_not_open_ends_the_run_at_its_start(tiny_run: TinyRun) -> None:
    wrong = Mlflow(tracking_uri="nonsense://me:secret@x", start_seconds=120.0)
    with pytest.raises(PluginError, match=r"mlflow: the store nonsense://me:\*+@x cannot be") as e:
        tiny_run(wrong)
    assert "unsupported URI" in str(e.value)
    assert "secret" not in str(e.value)
    assert e.value.exit_code == 7


def test_a_store_that_takes_too_long_ends_the_run(tiny_run: TinyRun) -> None:
    with pytest.raises(PluginError, match=r"it did not open within 0\.01 seconds"):
        tiny_run(Mlflow(start_seconds=0.01))


@plugin
class Terminates:
    """Asks the run for its end while it waits for its store."""

    after: int
    """How many answers of the store come first."""

    @hookimpl
    def on_progress(self, run: Run, task: str, done: int) -> None:
        if "opening" in task and done == self.after:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("way", ["error", "journal"])
def test_a_signal_ends_the_wait_for_a_store_that_hangs(
    tiny_run: TinyRun, silent: str, way: str
) -> None:
    one = logger("hangs", tracking_uri=silent, on_start_failure=way)
    run = tiny_run(one, Terminates(after=0))
    assert (run.outcome, run.signal, run.progress.step) == ("interrupted", signal.SIGTERM, 0)
    assert not (run.folder / "mlflow" / "journal.jsonl").exists()
    assert "cannot be used" not in (run.folder / "mlflow" / "worker.log").read_text()
    assert workers() == []


def test_a_signal_during_the_wait_for_the_mlflow_run_ends_that_run_as_killed(
    look: Any, tiny_run: TinyRun
) -> None:
    """The worker may have created it already, and ends it while the training process exits."""
    run = tiny_run(logger("described late"), Terminates(after=1))
    assert (run.outcome, run.signal, run.progress.step) == ("interrupted", signal.SIGTERM, 0)
    rows = (run.folder / "mlflow" / "journal.jsonl").read_text().splitlines()
    assert [json.loads(row)["kind"] for row in rows] == ["start", "end"]
    until = time.monotonic() + 120
    while workers():
        assert time.monotonic() < until
        time.sleep(0.1)
    assert look.run("described late").info.status == "KILLED"
    tiny_run(logger("described late", resume="same"))
    assert look.run("described late").info.status == "FINISHED"


@plugin
class Stops:
    """Suspends the upload worker once the store is open, so that the MLflow run is late."""

    pid: int = 0

    @hookimpl
    def on_progress(self, run: Run, task: str, done: int) -> None:
        if "opening" in task and done == 1:
            worker: Any = run.plugins["mlflow"]._worker  # type: ignore[attr-defined]
            worker._start_seconds, self.pid = 1.0, worker._process.pid
            os.kill(self.pid, signal.SIGSTOP)


def test_an_mlflow_run_that_is_created_too_late_ends_as_failed(
    look: Any, tiny_run: TinyRun
) -> None:
    """The training process waits no longer; the worker ends the run once the store answers."""
    stops = Stops()
    with pytest.raises(PluginError, match=r"it did not open within 1 seconds"):
        tiny_run(logger("too late"), stops)
    os.kill(stops.pid, signal.SIGCONT)
    until = time.monotonic() + 120
    while workers():
        assert time.monotonic() < until
        time.sleep(0.1)
    kept = look.run("too late")
    assert kept.info.status == "FAILED"
    assert "it did not open within 1 seconds" in kept.data.tags["error"]


def test_the_time_for_the_start_counts_from_the_start_of_the_run(tmp_path: Path) -> None:
    """What building took is part of it, but for a third; each answer that comes is waited for."""
    worker = Worker(tmp_path, Mlflow(start_seconds=9.0).request(tmp_path, "nonsense://x"))
    until: list[float] = []
    one: Any = worker
    one._reply = lambda moment: until.append(moment - worker._started) or {}
    for built, waited in ((0.0, 0.0), (5.0, 1.0), (8.0, 0.0), (8.0, 7.0)):
        worker._started, worker._waited = time.monotonic() - built, waited
        worker.attach()
    worker.kill()
    assert until == pytest.approx([9.0, 9.0, 11.0, 10.0], abs=0.5)


def test_an_error_shows_the_message_of_the_operating_system_without_that_of_libraries() -> None:
    def around(inner: Exception) -> Exception:
        pool, error = OSError(f"pool: {inner}"), RuntimeError(f"failed with exception: {inner}")
        pool.__context__, error.__context__ = inner, pool
        return error

    todo = ": start its server, or set tracking_uri to a store that is there"
    refusal = ConnectionRefusedError(111, "Connection refused")
    assert explain(around(refusal)) == f"Connection refused{todo}"
    assert explain(around(TimeoutError("timed out"))) == f"it does not answer in time{todo}"
    reset = ConnectionResetError(104, "Connection reset by peer")
    assert explain(around(RuntimeError("aborted", reset))) == f"Connection reset by peer{todo}"
    assert explain(around(ValueError("x"))) == "failed with exception: x"
    assert explain(PermissionError(13, "Permission denied", "/x")).endswith("denied: '/x'")


@pytest.mark.slow
def test_a_run_may_start_without_its_store_and_be_synced_later(
    look: Any, tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"experiment": "later", "on_start_failure": "journal", **PATIENT}
    away = settings | {"tracking_uri": "http://127.0.0.1:9", "end_seconds": 5.0}
    run = tiny_run("mlflow", settings={"mlflow": away})
    assert "the store http://127.0.0.1:9 cannot be used" in caplog.text
    assert "fundamentallm mlflow sync" in caplog.text
    words = ["sync", str(run.folder), "--uri", look.uri]
    done = CliRunner().invoke(command, words, catch_exceptions=False, standalone_mode=False)
    assert f"all rows are in run {look.run('later').info.run_id}" in done.output
    kept = look.run("later")
    assert kept.info.status == "FINISHED"
    losses = [(int(row["step"]), row["train/loss"]) for row in run.history]
    assert look.points(kept, "train/loss") == losses


def test_a_store_that_is_away_at_the_end_does_not_make_a_finished_run_a_failed_one(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """Even if the worker does not receive the request to end, and is killed."""
    monkeypatch.setattr("fundamentallm_mlflow.child.GRACE_SECONDS", 0.0)
    recorder = Recorder()
    run = tiny_run(logger("ending", end_seconds=1.5), Stopper(), trace=recorder)
    assert "the store did not take the last rows in time" in caplog.text
    assert f"fundamentallm mlflow sync {run.folder}" in caplog.text
    reports = [given for hook, given in recorder.calls if hook == "on_progress"]
    ends = [(given["done"] < given["total"]) for given in reports if "uploading" in given["task"]]
    assert ends[-1] is False
    assert len(ends) > 1
    assert all(ends[:-1])


def test_an_error_in_the_final_wait_is_returned_and_not_raised(tmp_path: Path) -> None:
    class Broken:
        def finish(self, *given: Any) -> str | None:
            raise ValueError("flush of closed file")

    broken: Any = Broken()
    assert FinalWait(tmp_path, 1.0, print).wait(broken) == "ValueError: flush of closed file"


def test_the_worker_gives_up_after_end_seconds(monkeypatch: Any) -> None:
    class Away:
        def measure(self) -> None:
            raise ConnectionError

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

        def send(self, **facts: Any) -> None:
            """Drop the reply."""

    away: Any = Away()
    clock: Any = Clock()
    monkeypatch.setattr("fundamentallm_mlflow.worker.__main__.time", clock)
    loop = UploadLoop(away, clock, Commands(os.getppid()), {"end_seconds": 40.0})
    loop.away, loop._ended_at, loop._pause = True, 0.0, 30.0
    assert loop.run() == 3
    assert clock.now == 40.0


def test_ui_does_not_create_a_missing_database(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for words in ([], ["--uri", f"sqlite:///{tmp_path}/mlflow.db"]):
        with pytest.raises(SettingsError, match=rf"^{tmp_path}/mlflow\.db: there is no such"):
            CliRunner().invoke(ui, words, catch_exceptions=False, standalone_mode=False)
        assert list(tmp_path.iterdir()) == []


def test_sync_refuses_a_run_that_it_cannot_upload(tmp_path: Path) -> None:
    def error() -> str:
        with pytest.raises(FundamentalError) as caught:
            CliRunner().invoke(
                command, ["sync", str(tmp_path)], catch_exceptions=False, standalone_mode=False
            )
        return str(caught.value)

    assert "is not a run folder" in error()
    (tmp_path / "settings.toml").write_text("[run\n")
    assert f"{tmp_path}/settings.toml: cannot be read: " in error()
    (tmp_path / "settings.toml").write_text('plugins = ["mlflow"]\n')
    assert "has no journal" in error()
    journal = Journal(tmp_path / "mlflow" / "journal.jsonl")
    assert "is being trained" in error()
    journal.close()


def test_a_run_that_fails_before_its_first_step_leaves_nothing(
    look: Any, tiny_run: TinyRun, tmp_path: Path
) -> None:
    @plugin
    class Broken:
        """Builds no model."""

        @hookimpl
        def build_model(self, run: Run) -> Any:
            raise RuntimeError("no model")

    with pytest.raises(FundamentalError, match="no model"):
        tiny_run(logger("early"), Broken())
    assert not (tmp_path / "run" / "mlflow" / "journal.jsonl").exists()


def test_a_row_costs_the_training_process_one_write(
    tiny_run: TinyRun, monkeypatch: Any, tmp_path: Path
) -> None:
    """Counted in system calls: one write, and one look for news, which does not wait."""
    run = tiny_run(length=2)
    one = logger("counted")
    run.plugins["mlflow"] = one
    run.wanted_checkpoint = None
    one.on_run_start(run)
    one.on_train_start(run)
    calls: list[str] = []
    for name in ("write", "read", "open", "fsync", "pread"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *given, real=real, name=name: calls.append(name) or real(*given)
        )
    for _ in range(10):
        one.on_log(run, {"train/loss": 1.0}, validated=False)
    assert calls == ["write", "read"] * 10
    monkeypatch.undo()
    one.on_train_end(run, "finished")
    assert json.loads((run.folder / "mlflow" / "runs.json").read_text())[0]["closed"]


def test_a_row_costs_the_same_with_and_without_the_store(
    tiny_run: TinyRun, watch: Any, tmp_path: Path
) -> None:
    away = {"tracking_uri": "http://127.0.0.1:9", "on_start_failure": "journal", "end_seconds": 0.1}
    other = type(watch)()
    rows = {"log_every": 1, "length": 20}
    tiny_run(logger("here"), watch, **rows)
    tiny_run(logger("away", **away), other, run_dir=tmp_path / "away", **rows)
    watch.rows |= {step + 100: row for step, row in other.rows.items() if step > 1}
    watch.waits |= {step + 100: waits for step, waits in other.waits.items()}
    watch.called += other.called
    watch.assert_rows_cost_one_write(2, away=range(102, 120))
    watch.assert_it_stayed_at_home()


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_no_memory_and_wait_within_bounds_and_no_validation_is_lost(
    look: Any, tiny_run: TinyRun
) -> None:
    """Faster than any store takes them: what the journal gets is thinned, and is all there."""
    run = tiny_run(length=2)
    run.plugins["mlflow"] = one = logger("many", waiting_mb=1.0, end_seconds=500.0)
    run.wanted_checkpoint = None
    one.on_run_start(run)
    one.on_train_start(run)
    folder, this = run.folder / "mlflow", psutil.Process()
    blocks, memory, validated = 0, 0, 0
    for step in range(1, 100_001):
        run.progress.step = step
        metrics = {f"train/m{n}": step + n / 10 for n in range(10)}
        if step % 100 == 0:
            metrics["val/loss"] = 1 / step
            validated += len(json.dumps(metrics)) + 60
        one.on_log(run, metrics, validated="val/loss" in metrics)
        if step == 1000:
            blocks, memory = sys.getallocatedblocks(), this.memory_info().rss
    assert sys.getallocatedblocks() - blocks < 1000
    assert this.memory_info().rss - memory < 10_000_000
    assert (folder / "journal.jsonl").stat().st_size - uploaded_bytes(
        folder
    ) < 1_000_000 + validated
    one.on_train_end(run, "finished")
    kept = look.run("many")
    assert kept.info.status == "FINISHED"
    assert look.points(kept, "val/loss") == [(n, 1 / n) for n in range(100, 100_001, 100)]
    points = look.points(kept, "train/m3")
    assert all(value == step + 0.3 for step, value in points)
    steps = [step for step, _ in points]
    assert steps == sorted(set(steps))
    assert set(range(100, 100_001, 100)) <= set(steps)
    assert len(steps) > 2000


def test_a_full_disk_ends_the_logging_and_not_the_training(
    look: Any, tiny_run: TinyRun, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "run" / "mlflow").mkdir(parents=True)
    (tmp_path / "run" / "mlflow" / "journal.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left on device"):
        tiny_run(logger("full"))
    one = logger("full")
    one._journal = Journal(tmp_path / "run" / "mlflow" / "journal.jsonl")
    run = tiny_run(run_dir=tmp_path / "plain")
    one.on_rewind(run, 7)
    assert "the journal cannot be written (No space left on device)" in caplog.text
    one.on_rewind(run, 8)
