"""Run folders: one process at a time, what the core records in them, and how they are read."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import tomli
import torch

from fundamentallm import (
    DataError,
    PluginError,
    SettingsError,
    StorageError,
    folder,
    hookimpl,
    plugin,
    set_aside,
    train,
)
from fundamentallm.testing import Memory, compose_tiny


@plugin
class Refuses:
    """Have a checkpoint of another model."""

    @hookimpl
    def read_checkpoint(self):
        return {"model": {"other": torch.zeros(1)}}


def test_a_folder_that_a_process_is_training_in_is_refused_to_others(tiny_run, tmp_path):
    said = []

    @plugin
    class Intrudes:
        @hookimpl
        def on_step_start(self, run):
            try:
                train(compose_tiny(), run_dir=run.folder)
            except StorageError as error:
                said.append(str(error))

    tiny_run(Intrudes(), length=1, run_dir=tmp_path / "run")
    assert said == [f"{tmp_path / 'run'}: another process ({os.getpid()}) is training this run"]
    assert tiny_run(run_dir=tmp_path / "run").outcome == "finished", "the lock ended with its run"


def test_settings_that_do_not_fit_a_run_do_not_replace_its_record(tiny_run, tmp_path):
    tiny_run(run_dir=tmp_path / "run", seed=3)
    before = (tmp_path / "run" / "settings.toml").read_text()
    with pytest.raises(StorageError, match="another model"):
        tiny_run(Refuses(), run_dir=tmp_path / "run", seed=4)
    assert (tmp_path / "run" / "settings.toml").read_text() == before


def test_a_run_that_starts_again_in_its_folder_logs_that_there_is_no_checkpoint(tiny_run, caplog):
    tiny_run()
    assert "no checkpoint" not in caplog.text
    tiny_run()
    assert "there is no checkpoint: the run starts at step 0" in caplog.text


def test_the_record_holds_settings_and_environment(tiny_run):
    run = tiny_run(seed=5)
    recorded = tomli.loads((run.folder / "settings.toml").read_text())
    assert (recorded["run"]["seed"], recorded["run"]["length"]) == (5, "4 steps")
    found = json.loads((run.folder / "environment.json").read_text())
    assert found["seed"] == 5
    assert found["threads"] == torch.get_num_threads()
    # The metadata may lack the local part of the version, such as +cu130.
    assert found["versions"]["torch"] == metadata.version("torch")
    assert {"plugins", "git", "command", "host", "started", "python"} <= found.keys()


def test_every_new_run_gets_a_folder_of_its_own(tmp_path):
    names = [train(compose_tiny(folder=str(tmp_path), name="mine")).folder for _ in range(3)]
    assert [folder.relative_to(tmp_path) for folder in names] == [
        Path("mine"),
        Path("mine-2"),
        Path("mine-3"),
    ]


def test_a_missing_device_is_an_error_before_a_folder_is_made(tmp_path):
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    missing = next(name for name, has in there.items() if not has)
    with pytest.raises(SettingsError, match=f"there is no '{missing}' device here"):
        train(compose_tiny(folder=str(tmp_path / "runs"), device=missing))
    assert not (tmp_path / "runs").exists()


FORKS = """
import os, sys, time
from pathlib import Path
from fundamentallm import hookimpl, plugin, train
from fundamentallm.testing import compose_tiny

@plugin
class Forks:
    @hookimpl
    def on_step_start(self, run):
        child = os.fork()
        if child == 0:  # as a worker that loads data and does not notice the death of its parent
            time.sleep(60)
            os._exit(0)
        print(child, flush=True)
        os.kill(os.getpid(), 9)

train(compose_tiny(Forks()), run_dir=Path(sys.argv[1]))
"""


def test_a_child_that_outlives_a_killed_run_does_not_hold_its_folder(tiny_run, tmp_path):
    command = [sys.executable, "-c", FORKS, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        child = int(killed.stdout.readline())
        try:
            assert killed.wait(timeout=60) == -signal.SIGKILL
            os.kill(child, 0)  # it is there
            assert tiny_run(run_dir=tmp_path / "run").outcome == "finished"
        finally:
            os.kill(child, signal.SIGKILL)


# ---------------------------------------------------------------------------------------------
# outcome.json


@plugin
class Ends:
    """Ends a run after its second step, or before its first, in a chosen way."""

    by: str = "stop"
    when: str = "on_step_end"

    @hookimpl
    def build_data(self, run):
        if self.when == "build_data":
            raise DataError("corpus.txt: no such file")
        from fundamentallm.testing import TinyData

        return TinyData().build_data(run)

    @hookimpl
    def on_train_start(self, run):
        if self.when == "on_train_start":
            raise ValueError("no")

    @hookimpl
    def on_step_start(self, run):
        assert not (run.folder / "outcome.json").exists()
        assert folder.state(run.folder) == "running"

    @hookimpl
    def on_step_end(self, run):
        if run.progress.step == 2 and self.by == "stop":
            run.stop("enough")
        elif run.progress.step == 2 and self.by == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        elif run.progress.step == 2 and self.by == "error":
            raise ValueError("no\n" + "!" * 1000)

    @hookimpl
    def on_train_end(self):
        if self.by == "closing":
            raise ValueError("cannot close")


def test_a_finished_run_says_so_in_its_folder(tiny_run):
    before = time.time()
    run = tiny_run(length=3)
    facts = json.loads((run.folder / "outcome.json").read_text())
    assert before <= facts.pop("time") <= time.time()
    assert facts == {
        "outcome": "finished",
        "step": 3,
        "begun": True,
        "reason": None,
        "error": None,
        "exit_code": 0,
    }
    assert folder.state(run.folder) == "finished"


@pytest.mark.parametrize(
    ("by", "outcome", "reason", "code"),
    [("stop", "stopped", "enough", 0), ("signal", "interrupted", "SIGTERM", 143)],
)
def test_a_run_that_was_asked_to_end_records_by_what(tiny_run, by, outcome, reason, code):
    ended = folder.ending(tiny_run(Ends(by=by), length=5).folder)
    assert (ended.outcome, ended.step, ended.reason, ended.exit_code) == (outcome, 2, reason, code)


def test_a_failed_run_records_its_error_in_one_line_and_its_exit_code(tmp_path):
    with pytest.raises(PluginError):
        train(compose_tiny(Ends(by="error"), length=5), run_dir=tmp_path)
    ended = folder.ending(tmp_path)
    assert (ended.outcome, ended.step, ended.begun, ended.exit_code) == ("failed", 2, True, 7)
    assert ended.error.startswith("PluginError: plugin 'ends'")
    assert len(ended.error.splitlines()) == 1
    assert len(ended.error) <= 500


def test_a_run_that_cannot_be_closed_has_failed(tmp_path):
    with pytest.raises(PluginError):
        train(compose_tiny(Ends(by="closing"), length=1), run_dir=tmp_path)
    assert folder.state(tmp_path) == "failed"


def test_a_start_that_fails_records_settings_and_outcome_and_frees_the_name(tmp_path):
    def start(when):
        return train(compose_tiny(Ends(when=when), length=1, folder=str(tmp_path), name="mine"))

    with pytest.raises(DataError):
        start("build_data")
    failed = folder.ending(tmp_path / "mine")
    assert (failed.outcome, failed.begun, failed.step) == ("failed", False, 0)
    assert failed.error == "DataError: corpus.txt: no such file"
    assert folder.settings(tmp_path / "mine")["run"]["name"] == "mine"
    with pytest.raises(DataError):
        start("build_data")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert start("").folder == tmp_path / "mine"
    assert folder.state(tmp_path / "mine") == "finished"
    assert start("").folder == tmp_path / "mine-2"


def test_a_run_that_fails_in_on_train_start_keeps_its_name(tmp_path):
    settings = {"folder": str(tmp_path), "name": "mine", "length": 1}
    with pytest.raises(PluginError):
        train(compose_tiny(Ends(when="on_train_start"), **settings))
    assert folder.ending(tmp_path / "mine").begun
    assert train(compose_tiny(**settings)).folder == tmp_path / "mine-2"


def test_a_finished_run_that_cannot_be_built_again_keeps_its_outcome(tiny_run):
    run = tiny_run(length=3)
    with pytest.raises(DataError):
        tiny_run(Ends(when="build_data"), length=5)
    assert folder.ending(run.folder).outcome == "finished"


def test_a_run_that_is_continued_has_no_outcome_until_it_ends_again(tiny_run):
    memory = Memory(step=3)
    tiny_run(memory, length=3)
    run = tiny_run(Ends(by=""), memory, length=5)  # whose on_step_start looks
    assert folder.ending(run.folder).step == 5


def test_a_folder_that_is_gone_at_the_end_is_one_warning(tiny_run, caplog):
    @plugin
    class Deletes:
        @hookimpl
        def on_safe_point(self, run):
            if run.ending:
                shutil.rmtree(run.folder)

    assert tiny_run(Deletes()).outcome == "finished"
    (said,) = [r.getMessage() for r in caplog.records if "outcome.json" in r.getMessage()]
    assert said.startswith("how the run ended is not recorded: ")
    assert said.endswith("No such file or directory")


# ---------------------------------------------------------------------------------------------
# Reading


def test_the_lock_names_its_process_and_when_that_took_it(tiny_run, tmp_path):
    found = []

    @plugin
    class Looks:
        @hookimpl
        def on_step_start(self, run):
            found.append((folder.owner(run.folder), folder.is_running(run.folder)))

    before = time.time()
    run = tiny_run(Looks(), length=1)
    ((owner, running),) = found
    assert running
    assert owner.pid == os.getpid()
    assert before <= owner.started <= time.time()
    assert folder.owner(run.folder) is None
    assert not folder.is_running(run.folder)


def test_asking_whether_a_run_goes_on_does_not_keep_it_from_starting(tiny_run, tmp_path):
    (tmp_path / "run").mkdir()
    script = "import sys; from pathlib import Path; from fundamentallm import folder\n"
    script += "print(flush=True)\nwhile True: folder.is_running(Path(sys.argv[1]))"
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as asking:
        try:
            asking.stdout.readline()
            for _ in range(5):
                assert tiny_run(length=1).outcome == "finished"
        finally:
            asking.kill()


def test_a_process_that_is_killed_leaves_a_run_that_was_killed(tmp_path):
    command = [sys.executable, "-c", FORKS.replace("os.fork()", "1"), str(tmp_path / "run")]
    subprocess.run(command, capture_output=True)
    assert folder.state(tmp_path / "run") == "killed"
    assert folder.ending(tmp_path / "run") is None


def test_rows_are_read_as_written_and_damaged_lines_are_skipped(tiny_run):
    run = tiny_run("jsonl", length=4)
    whole = list(folder.rows(run.folder))
    assert [row.step for row in whole] == [2, 4]
    assert whole[0].metrics["train/loss"] == run.history[0]["train/loss"]
    path = run.folder / "metrics.jsonl"
    bad = [
        "",
        "{",
        "[]",
        "null",
        '{"step": 1}',
        '{"step": 1.5, "tokens": 1, "time": 1, "metrics": {}}',
    ]
    bad += ['{"step": 1, "tokens": 1, "time": "nan", "metrics": {}}', "[" * 100_000]
    good = '{"step": 9, "tokens": 1, "time": 1, "metrics": {"val/loss": "NaN", "x": "-Infinity"}}'
    foreign = good.replace('"NaN"', "null").replace('"-Infinity"', "NaN").replace("9", "8")
    path.write_text(path.read_text() + "\n".join([*bad, foreign, good]))
    *same, other, last = folder.rows(run.folder)
    assert repr(other.metrics) == "{'val/loss': nan, 'x': nan}"
    assert same == whole
    assert repr(last.metrics) == "{'val/loss': nan, 'x': -inf}"


def test_what_is_set_aside_gets_a_free_name_with_its_suffix(tmp_path):
    made = []
    for _ in range(3):
        (tmp_path / "a.b.csv").write_text(str(len(made)))
        made.append(set_aside(tmp_path / "a.b.csv", ".csv"))
    assert [path.read_text() for path in made] == ["0", "1", "2"]
    assert all(re.fullmatch(r"a\.b\.before-\d+\.csv", path.name) for path in made)
    (tmp_path / "events").mkdir()
    assert re.fullmatch(r"events\.before-\d+", set_aside(tmp_path / "events").name)
    assert sorted(tmp_path.iterdir()) == sorted([*made, *tmp_path.glob("events.before-*")])


def test_checkpoints_are_listed_with_what_their_manifests_say(tiny_run):
    run = tiny_run(
        "checkpoint",
        "often",
        settings={"checkpoint": {"every": 4}, "often": {"plugin": "checkpoint", "every": 2}},
        validate_every=2,
        length=4,
    )
    found = folder.checkpoints(run.folder)
    home = run.folder / "checkpoints"
    assert {(one.folder, one.step) for one in found} == {
        (home / "step-00000004", 4),
        (home / "often" / "step-00000002", 2),
        (home / "often" / "step-00000004", 4),
    }
    assert found[0].step == 2
    assert found[0].metrics["val/loss"] > 0
    assert found[0].finite
    assert found[-1].tags == ("final",)
    for one in found:
        assert one.size == sum(
            path.stat().st_size for path in one.folder.iterdir() if path.name != "manifest.json"
        )
    (home / "step-00000007").mkdir()
    (home / "step-00000007" / "manifest.json").write_text("{")  # damaged, and there
    (home / ".tmp-00000009").mkdir()
    assert [one.step for one in folder.checkpoints(run.folder)] == [2, 4, 4, 7]


def test_checkpoints_in_another_folder_are_found_and_those_of_other_runs_left_out(
    tiny_run, tmp_path
):
    settings = {"checkpoint": {"every": 2, "folder": str(tmp_path / "saved")}}
    run = tiny_run("checkpoint", settings=settings, length=4)
    assert [one.step for one in folder.checkpoints(run.folder)] == [2, 4]
    (run.folder / "run-id").write_text("0123456789ab\n")
    assert folder.checkpoints(run.folder) == []
