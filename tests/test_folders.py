"""A run folder: one process at a time, and a record that is replaced only by one that fits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tomli
import torch

from fundamentallm import SettingsError, StorageError, hookimpl, plugin, train
from fundamentallm.testing import compose_tiny


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
    assert said == [f"{tmp_path / 'run'}: another process is training this run"]
    assert tiny_run(run_dir=tmp_path / "run").outcome == "finished", "the lock ended with its run"


def test_settings_that_do_not_fit_a_run_do_not_replace_its_record(tiny_run, tmp_path):
    tiny_run(run_dir=tmp_path / "run", seed=3)
    before = (tmp_path / "run" / "settings.toml").read_text()
    with pytest.raises(StorageError, match="another model"):
        tiny_run(Refuses(), run_dir=tmp_path / "run", seed=4)
    assert (tmp_path / "run" / "settings.toml").read_text() == before


def test_a_run_begun_anew_in_its_folder_says_that_there_is_no_checkpoint(tiny_run, caplog):
    tiny_run()
    assert "no checkpoint" not in caplog.text
    tiny_run()
    assert "there is no checkpoint: the run begins at step 0" in caplog.text


def test_the_record_tells_settings_and_environment(tiny_run):
    run = tiny_run(seed=5)
    recorded = tomli.loads((run.folder / "settings.toml").read_text())
    assert (recorded["run"]["seed"], recorded["run"]["length"]) == (5, "4 steps")
    told = json.loads((run.folder / "environment.json").read_text())
    assert told["seed"] == 5
    assert told["threads"] == torch.get_num_threads()
    # The metadata may lack the local part of the version, such as +cu130.
    assert told["versions"]["torch"] == metadata.version("torch")
    assert {"plugins", "git", "command", "host", "started", "python"} <= told.keys()


def test_every_new_run_gets_a_folder_of_its_own(tmp_path):
    names = [train(compose_tiny(folder=str(tmp_path), name="mine")).folder for _ in range(3)]
    assert [folder.relative_to(tmp_path) for folder in names] == [
        Path("mine"),
        Path("mine-2"),
        Path("mine-3"),
    ]


def test_a_missing_device_is_told_before_a_folder_is_made(tmp_path):
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
        if child == 0:  # as a worker that loads data, and does not notice that nobody wants them
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
