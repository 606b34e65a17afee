"""A failed run leaves a report; a finished one does not."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fundamentallm import (
    DataError,
    FundamentalError,
    PluginError,
    SettingsError,
    hookimpl,
    plugin,
    train,
)
from fundamentallm.testing import PluginContract, compose_tiny
from fundamentallm_crash_report import CrashReport, memory


class TestContract(PluginContract):
    plugin = CrashReport


@plugin
class Fails:
    """Fails in one hook of a step, by default of the third."""

    hook: str = "on_step_start"
    done: int = 2

    def fail(self, hook, run):
        if hook == self.hook and run.progress.step >= self.done:
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
def test_the_report_names_the_step_and_what_the_run_was_doing(
    tiny_run, tmp_path, hook, step, doing
):
    _, folder = crashed(tiny_run, tmp_path, CrashReport(), Fails(hook=hook))
    crash = json.loads((folder / "crash.json").read_text())
    assert (crash["step"], crash["doing"]) == (step, doing)
    assert "nothing to divide by" in crash["error"]


def test_the_report_holds_traceback_settings_versions_and_window(tiny_run, tmp_path):
    error, folder = crashed(tiny_run, tmp_path, CrashReport(), Fails(hook="on_step_end"))
    trace = (folder / "traceback.txt").read_text()
    assert "ZeroDivisionError: nothing to divide by" in trace
    assert "PluginError" in trace
    assert json.loads((folder / "settings.json").read_text())["run"]["log_every"] == "1 step"
    assert "fundamentallm-crash-report" in json.loads((folder / "versions.json").read_text())
    crash = json.loads((folder / "crash.json").read_text())
    assert crash["window"] == [{"first": 4, "samples": 4, "weight": 4.0}]
    assert f"a report is in {folder}" in error.__notes__


def test_only_the_last_rows_are_put_in(tiny_run, tmp_path):
    _, folder = crashed(tiny_run, tmp_path, CrashReport(rows=1), Fails())
    (row,) = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["step"] == 2
    _, folder = crashed(tiny_run, tmp_path / "none", CrashReport(rows=0), Fails())
    assert (folder / "metrics.jsonl").read_text() == ""


def test_a_failure_before_the_first_step_writes_a_report(tiny_run, tmp_path):
    @plugin
    class Broken:
        @hookimpl
        def adapt_model(self):
            raise ValueError("no such layer")

    _, folder = crashed(tiny_run, tmp_path, CrashReport(), Broken())
    crash = json.loads((folder / "crash.json").read_text())
    assert (crash["step"], crash["doing"]) == (0, "building")


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


def test_a_step_that_has_no_window_yet_does_not_show_the_one_before(tiny_run, tmp_path):
    for hook, window in (
        ("on_step_start", "none yet"),
        ("on_step_end", [{"first": 4, "samples": 4, "weight": 4.0}]),
    ):
        _, folder = crashed(tiny_run, tmp_path / hook, CrashReport(), Fails(hook=hook))
        assert json.loads((folder / "crash.json").read_text())["window"] == window


def broken_off(tmp_path, *plugins, rows=100, log_every=1):
    """Train ten steps, and from the checkpoint of the tenth on until a failure after the 14th."""
    plugins = ("checkpoint", *plugins)
    settings = {"checkpoint": {"every": 10, "allow_changes": ["fails"]}}
    for length, failing in ((10, ()), (20, (CrashReport(rows=rows), Fails(done=14)))):
        composed = compose_tiny(
            *plugins, *failing, settings=settings, length=length, log_every=log_every
        )
        try:
            train(composed, run_dir=tmp_path)
        except PluginError:
            assert failing
    lines = (tmp_path / "crash" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_last_rows_are_also_those_of_the_processes_before(tmp_path):
    rows = broken_off(tmp_path / "run", "jsonl")
    assert [row["step"] for row in rows] == [*range(1, 15)]
    assert all(isinstance(row["train/loss"], float) for row in rows), "all are of one form"
    rows = broken_off(tmp_path / "fewer", "jsonl", rows=7)
    assert [row["step"] for row in rows] == [*range(8, 15)]
    rows = broken_off(tmp_path / "own", "jsonl", rows=3)
    assert [row["step"] for row in rows] == [12, 13, 14]
    rows = broken_off(tmp_path / "alone")
    assert [row["step"] for row in rows] == [11, 12, 13, 14]


LINES = b"""{"time": 1.0, "step": 1, "tokens": 4, "metrics": {"train/loss": "NaN"}}
{"step": 2}
[]
\xff\xfe
{"step": 2, "metrics": {"train/loss": "much"}}
{"time": 1.0, "step": 9, "tokens": 4, "metrics": {"train/loss": 0.5}}
{"time": 1.0, "step": 3, "tok"""


def test_lines_that_are_no_rows_of_the_steps_before_are_left_out(tiny_run, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(LINES)
    _, folder = crashed(tiny_run, tmp_path, CrashReport(), Fails(), log_every=2)
    one, two = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert (one["step"], math.isnan(one["train/loss"]), two["step"]) == (1, True, 2)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    _, folder = crashed(tiny_run, tmp_path, CrashReport(), Fails(), log_every=2)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


@plugin
class Missing:
    """Data that is not there."""

    @hookimpl
    def build_data(self):
        raise DataError("corpus.txt: no such file")


@pytest.mark.parametrize(
    ("plugins", "run", "at"),
    [((), {}, "foo"), ((), {}, "step-00000099"), ((), {"seed": 5}, None), ((Missing(),), {}, None)],
    ids=["no checkpoint", "no such step", "another seed", "no data"],
)
def test_a_mistake_in_how_a_run_is_called_leaves_the_report_of_its_failure(
    tiny_run, tmp_path, plugins, run, at
):
    settings = {"checkpoint": {"every": 1}}
    _, folder = crashed(tiny_run, tmp_path, "checkpoint", CrashReport(), Fails(), settings=settings)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    composed = compose_tiny("checkpoint", CrashReport(), *plugins, settings=settings, **run)
    with pytest.raises(FundamentalError) as raised:
        train(composed, run_dir=tmp_path, at=at)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir() if "crash" in p.name) == ["crash"]
    assert not any("report" in note for note in getattr(raised.value, "__notes__", []))


def test_wrong_settings_write_no_report_and_missing_data_writes_one(tmp_path):
    def called(*plugins, **given):
        with pytest.raises(FundamentalError) as raised:
            train(compose_tiny(CrashReport(), *plugins), run_dir=tmp_path / "run", **given)
        return raised.value

    assert isinstance(called(at="foo"), SettingsError)
    assert not (tmp_path / "run" / "crash").exists()
    crash = tmp_path / "run" / "crash" / "crash.json"
    called(Missing())
    assert "corpus.txt" in crash.read_text()
    called(Unfinished())
    assert "half a model" in crash.read_text(), "of two that never trained, the later counts"


@plugin
class Unfinished:
    """A model that cannot be made."""

    @hookimpl
    def adapt_model(self):
        raise ValueError("half a model")


def test_a_report_that_cannot_be_written_does_not_hide_the_error(
    tiny_run, tmp_path, monkeypatch, caplog
):
    _, folder = crashed(tiny_run, tmp_path, CrashReport(), Fails(hook="on_step_end"))
    before = (folder / "crash.json").read_text()
    write = Path.write_text

    def full(self, *words, **named):
        if self.name == "settings.json":
            raise OSError(28, "No space left on device")
        return write(self, *words, **named)

    monkeypatch.setattr(Path, "write_text", full)
    (tmp_path / ".crash").mkdir()  # of a process that was killed
    caplog.clear()
    with pytest.raises(PluginError, match="nothing to divide by") as raised:
        tiny_run(CrashReport(), Fails(), run_dir=tmp_path)
    assert not getattr(raised.value, "__notes__", [])
    (line,) = [record.getMessage() for record in caplog.records if "crash" in record.getMessage()]
    assert line == (
        f"crash_report: no report could be written to {folder}: No space left on device"
    )
    assert (folder / "crash.json").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir() if "crash" in p.name) == ["crash"]


REFUSED = """
import resource, sys
from fundamentallm import FundamentalError, hookimpl, plugin, train
from fundamentallm.testing import compose_tiny
from fundamentallm_crash_report import CrashReport

@plugin
class Fails:
    @hookimpl
    def on_step_end(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        raise ValueError("no such layer")

try:
    train(compose_tiny(CrashReport(), Fails()), run_dir=sys.argv[1])
except FundamentalError as error:
    print(error, *getattr(error, "__notes__", ()))
"""


def test_a_report_that_the_system_refuses_leaves_one_line_and_no_trace(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, tmp_path], capture_output=True, text=True, check=True
    )
    assert "no such layer" in done.stdout
    assert "a report is in" not in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if "crash" in line]
    assert line.endswith(f"could be written to {tmp_path / 'crash'}: File too large")
    assert not [path for path in tmp_path.iterdir() if "crash" in path.name]


def test_a_device_that_answers_no_more_does_not_cost_the_report(monkeypatch):
    def failed():
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr("torch.cuda.mem_get_info", failed)
    assert memory("cuda") == {"unknown": "CUDA error: device-side assert triggered"}


@plugin
class BreaksSecond:
    """Raises an error in one process."""

    @hookimpl
    def on_step_end(self, run):
        if run.rank and run.progress.step == 2:
            raise RuntimeError("broken on purpose")


def test_of_two_processes_each_reports_its_own_error(two_processes):
    first, second = two_processes(CrashReport(), BreaksSecond())
    assert "broken on purpose" in str(second.error)
    for folder, text in (("crash", "PeerError"), ("crash-rank-1", "broken on purpose")):
        assert text in (first.folder / folder / "traceback.txt").read_text()
