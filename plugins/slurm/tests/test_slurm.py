"""A job is requeued exactly when a signal stopped its run. ``scontrol`` is a script here."""

from __future__ import annotations

import os
import signal
import sys

import forked
import pytest

from fundamentallm import SettingsError, compose, hookimpl, plugin
from fundamentallm.testing import PluginContract
from fundamentallm_slurm import Slurm


class TestContract(PluginContract):
    plugin = Slurm


@plugin
class Sends:
    """Sends a signal to its own process in step 2."""

    number: int

    @hookimpl
    def on_step_end(self, run):
        if run.progress.step == 2:
            signal.raise_signal(self.number)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A SLURM job whose ``scontrol`` writes down what it is asked for."""
    tool, written = tmp_path / "bin" / "scontrol", tmp_path / "asked"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {written}\nexit ${{REFUSE:-0}}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    return written


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_run_that_a_signal_stops_is_requeued(tiny_run, asked, number):
    assert tiny_run(Slurm(), Sends(number=number)).outcome == "interrupted"
    assert asked.read_text() == "requeue 4711\n"


def test_a_run_whose_time_is_up_is_requeued(tiny_run, asked):
    run = tiny_run(Slurm(), length=10**9, log_every=10**9, max_time="0.3 seconds")
    assert (run.outcome, run.signal) == ("interrupted", signal.SIGUSR1)
    assert asked.read_text() == "requeue 4711\n"


def test_only_the_signals_that_are_set_count(tiny_run, asked):
    tiny_run(Slurm(signals=["SIGUSR1"]), Sends(number=signal.SIGTERM))
    tiny_run(Slurm(), Sends(number=signal.SIGINT))
    assert not asked.exists()


def test_a_run_that_finishes_is_not(tiny_run, asked):
    tiny_run(Slurm())
    assert not asked.exists()


def test_outside_of_slurm_nothing_is_asked_for(tiny_run, asked, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID")
    tiny_run(Slurm(), Sends(number=signal.SIGUSR1))
    assert not asked.exists()


@pytest.mark.parametrize("refuse", ["1", None])
def test_a_queue_that_refuses_is_a_warning(tiny_run, asked, monkeypatch, caplog, refuse):
    if refuse:
        monkeypatch.setenv("REFUSE", refuse)
    else:
        monkeypatch.setenv("PATH", "/nonexistent")
    assert tiny_run(Slurm(), Sends(number=signal.SIGUSR1)).outcome == "interrupted"
    assert "job 4711 could not be requeued" in caplog.text


TINY = """
from fundamentallm import plugin
from fundamentallm.testing import TinyParts

@plugin
class Tiny(TinyParts):
    pass
"""

SETTINGS = """
plugins = ["console", "checkpoint", "slurm", "./tiny.py"]

[run]
length = "1000000 steps"
log_every = "1000000 steps"
max_time = "0.5 seconds"
device = "cpu"
"""


def test_a_job_that_the_requeue_ends_still_has_its_exit_code_and_log(asked, tmp_path):
    tool = tmp_path / "bin" / "scontrol"
    tool.write_text(tool.read_text().replace("exit", "kill -TERM $PPID\nexit"))
    (tmp_path / "tiny.py").write_text(TINY)
    settings, folder = tmp_path / "settings.toml", tmp_path / "run"
    settings.write_text(SETTINGS)
    done = forked.run(
        [sys.executable, "-m", "fundamentallm", "train", settings, "--run-dir", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGUSR1, done.stderr
    assert asked.read_text() == "requeue 4711\n"
    assert "Traceback" not in done.stderr
    assert f"fundamentallm resume {folder}" in done.stderr
    assert any((folder / "checkpoints").glob("step-*"))
    log = (folder / "train.log").read_text()
    assert "slurm: job 4711 is requeued" in log
    assert "interrupted at step" in log.splitlines()[-1]


def test_a_signal_that_does_not_exist_is_a_mistake_in_the_settings():
    with pytest.raises(SettingsError, match=r"slurm\.signals: there is no signal 'SIGFOO'"):
        compose({"plugins": ["slurm"], "run": {"length": 1}, "slurm": {"signals": ["SIGFOO"]}})
