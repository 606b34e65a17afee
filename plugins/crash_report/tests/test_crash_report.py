"""A failed run leaves a report; a finished one does not."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from fundamentallm import PluginError, hookimpl, plugin
from fundamentallm.testing import PluginContract
from fundamentallm_crash_report import CrashReport


class TestContract(PluginContract):
    plugin = CrashReport


@plugin
class Fails:
    """Fails in one hook of the third step."""

    hook: str = "on_step_start"

    def fail(self, hook, run):
        if hook == self.hook and run.progress.step >= 2:
            raise ZeroDivisionError("nothing to divide by")

    @hookimpl
    def on_step_start(self, run):
        self.fail("on_step_start", run)

    @hookimpl
    def on_step_end(self, run):
        self.fail("on_step_end", run)

    @hookimpl
    def on_validation_end(self, run):
        self.fail("on_validation_end", run)

    @hookimpl(wrapper=True)
    def forward(self, run):
        if run.phase != "train":
            self.fail("forward", run)
        return (yield)


def crashed(tiny_run, tmp_path, *plugins, **run):
    with pytest.raises(PluginError) as raised:
        tiny_run(*plugins, run_dir=tmp_path, **{"log_every": 1, **run})
    return raised.value, tmp_path / "crash"


@pytest.mark.parametrize(
    ("hook", "step", "doing"),
    [
        ("on_step_start", 3, "in a step"),
        ("on_step_end", 2, "between two steps"),
        ("on_validation_end", 4, "between two steps"),
        ("forward", 4, "validating"),
    ],
)
def test_a_failed_run_tells_the_step_and_what_it_was_doing(tiny_run, tmp_path, hook, step, doing):
    _, folder = crashed(tiny_run, tmp_path, CrashReport(), Fails(hook=hook))
    told = json.loads((folder / "crash.json").read_text())
    assert (told["step"], told["doing"]) == (step, doing)
    assert "nothing to divide by" in told["error"]


def test_the_report_holds_traceback_settings_versions_and_window(tiny_run, tmp_path):
    error, folder = crashed(tiny_run, tmp_path, CrashReport(), Fails(hook="on_step_end"))
    trace = (folder / "traceback.txt").read_text()
    assert "ZeroDivisionError: nothing to divide by" in trace
    assert "PluginError" in trace
    assert json.loads((folder / "settings.json").read_text())["run"]["log_every"] == "1 step"
    assert "fundamentallm-crash-report" in json.loads((folder / "versions.json").read_text())
    told = json.loads((folder / "crash.json").read_text())
    assert told["window"] == [{"first": 4, "samples": 4, "weight": 4.0}]
    assert f"a report is in {folder}" in error.__notes__


def test_only_the_last_rows_are_put_in(tiny_run, tmp_path):
    _, folder = crashed(tiny_run, tmp_path, CrashReport(rows=1), Fails())
    (row,) = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["step"] == 2
    _, folder = crashed(tiny_run, tmp_path / "none", CrashReport(rows=0), Fails())
    assert (folder / "metrics.jsonl").read_text() == ""


def test_a_failure_before_the_first_step_is_reported_too(tiny_run, tmp_path):
    @plugin
    class Broken:
        @hookimpl
        def adapt_model(self):
            raise ValueError("no such layer")

    _, folder = crashed(tiny_run, tmp_path, CrashReport(), Broken())
    told = json.loads((folder / "crash.json").read_text())
    assert (told["step"], told["doing"]) == (0, "building")


def test_a_later_failure_replaces_the_report(tiny_run, tmp_path):
    crashed(tiny_run, tmp_path, CrashReport(), Fails())
    (tmp_path / "crash" / "old.txt").touch()
    crashed(tiny_run, tmp_path, CrashReport(), Fails(hook="forward"))
    assert not (tmp_path / "crash" / "old.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir() if "crash" in p.name) == ["crash"]


def test_a_run_that_finishes_or_is_interrupted_leaves_none(tiny_run, tmp_path):
    @plugin
    class Interrupts:
        @hookimpl
        def on_step_end(self, run):
            signal.raise_signal(signal.SIGTERM)

    tiny_run(CrashReport(), run_dir=tmp_path / "a")
    assert tiny_run(CrashReport(), Interrupts(), run_dir=tmp_path / "b").outcome == "interrupted"
    assert not list(tmp_path.rglob("crash*"))


def test_a_report_that_cannot_be_written_does_not_hide_the_error(tiny_run, tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(PluginError, match="nothing to divide by"):
        tiny_run(CrashReport(), Fails(), run_dir=tmp_path)
