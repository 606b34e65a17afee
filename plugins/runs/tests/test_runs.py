"""Runs as their folders show them: finished, running, killed, and damaged by hand."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import tomli
import tomli_w
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm import (
    DataError,
    FundamentalError,
    PluginError,
    SettingsError,
    StorageError,
    train,
)
from fundamentallm import folder as run_folder
from fundamentallm.testing import TinyData, TinyModel, TinyOptimizer, TinySamples
from fundamentallm_runs.cli import compare, rerun, runs, watch
from fundamentallm_runs.compare import differences
from fundamentallm_runs.curves import POINTS, curve, extremes, smoothed
from fundamentallm_runs.metrics_file import Columns, gathered
from fundamentallm_runs.rerun import (
    Comparison,
    Saved,
    data_change,
    different_weights,
    newest_saved,
)
from fundamentallm_runs.run_record import Record, read
from fundamentallm_runs.tail import Tail

Row, parse_row = run_folder.Row, run_folder.parse_row

LOCAL = '''
from torch import nn
from fundamentallm import hookimpl, plugin
from fundamentallm.testing import TinyData, TinyModel, TinyOptimizer, TinySamples

@plugin
class Parts:
    """Tiny data, model and optimizer."""

    lr: float = 0.1
    noise: bool = False

    @hookimpl
    def build_data(self, run):
        return TinySamples(4, run.device)

    @hookimpl
    def build_model(self, run):
        return TinyModel().build_model()

    @hookimpl
    def build_optimizer(self, run):
        return TinyOptimizer(lr=self.lr).build_optimizer(run=run)

    @hookimpl
    def on_step_start(self, run):
        if self.noise:  # what no seed decides
            import os, torch
            with torch.no_grad():
                run.parameters[0].add_(int.from_bytes(os.urandom(2), "big") * 1e-6)
'''


FAILS = '''
from fundamentallm import hookimpl, plugin

@plugin
class Fails:
    """Fails in its fifth step."""

    @hookimpl
    def on_step_start(self, run):
        if run.progress.step == 4:
            raise ValueError("no more")
'''


def trained(folder: Path, lr: float = 0.1, plugins=(), **more):
    """Train a tiny run into a folder."""
    folder.parent.mkdir(exist_ok=True)
    (folder.parent / "parts.py").write_text(LOCAL)
    settings = {
        "plugins": [str(folder.parent / "parts.py"), "jsonl", "checkpoint", *plugins],
        "run": {"length": 8, "log_every": 2, "validate_every": 4, "device": "cpu"},
        "parts": {"lr": lr, **more},
        "checkpoint": {"every": 4},
    }
    train(settings, run_dir=folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two finished runs that differ in the learning rate."""
    folder = tmp_path_factory.mktemp("made")
    return trained(folder / "slow", 0.01), trained(folder / "fast", 0.1)


@pytest.fixture
def copies(two, tmp_path):
    """Copies of the two runs, to be broken."""
    for one in two:
        shutil.copytree(one, tmp_path / one.name)
    return tmp_path / "slow", tmp_path / "fast"


def said(command, *words, fails=None):
    done = CliRunner().invoke(command, [str(word) for word in words])
    if fails is not None:
        assert isinstance(done.exception, fails), done.output
        return str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


def test_the_runs_of_a_folder_are_listed_with_their_state_and_best(two):
    (slow, fast) = json.loads(said(runs, two[0].parent, "--json"))
    assert (slow["run"], fast["run"]) == ("slow", "fast")
    assert slow["state"] == fast["state"] == "finished"
    assert (slow["step"], slow["done"]) == (8, "100%")
    rows = [
        json.loads(line)["metrics"] for line in (two[0] / "metrics.jsonl").read_text().splitlines()
    ]
    assert slow["best"] == min(row["val/loss"] for row in rows if "val/loss" in row)
    shown = said(runs, two[0].parent)
    assert re.search(r"^slow +finished +8 +100%", shown, re.MULTILINE)


def test_commands_report_a_folder_without_runs_and_a_missing_folder(tmp_path):
    assert "no runs" in said(runs, tmp_path)
    assert "no such folder" in said(runs, tmp_path / "gone", fails=StorageError)
    assert "not a run folder" in said(compare, tmp_path, fails=SettingsError)
    assert "not a run folder" in said(watch, tmp_path, fails=SettingsError)


def test_a_run_is_running_exactly_while_a_process_holds_it(copies):
    code = f"import fcntl, sys; f = open({str(copies[0] / '.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        assert read(copies[0]).state == "running"
        holder.kill()
    assert read(copies[0]).state == "finished"


def ended(folder, **facts):
    (folder / "outcome.json").write_text(
        json.dumps({"outcome": "finished", "step": 8, "error": None} | facts)
    )


@pytest.mark.parametrize("length", ["2 epochs", "3 hours", "90 seconds", 8])
def test_a_run_of_any_length_is_finished_if_its_outcome_is_finished(copies, length):
    settings = tomli.loads((copies[0] / "settings.toml").read_text())
    settings["run"]["length"] = length
    (copies[0] / "settings.toml").write_text(tomli_w.dumps(settings))
    ended(copies[0])
    assert re.search(r"^slow +finished +8 +100%", said(runs, copies[0].parent), re.MULTILINE)
    (copies[0] / "outcome.json").unlink()
    share = 1.0 if length == 8 else None
    assert (read(copies[0]).state, read(copies[0]).share) == ("killed", share)


@pytest.mark.parametrize("outcome", ["stopped", "interrupted", "failed"])
def test_a_run_is_listed_with_the_outcome_that_it_recorded(copies, outcome):
    ended(copies[0], outcome=outcome)
    assert re.search(rf"^slow +{outcome} +8 +100%", said(runs, copies[0].parent), re.MULTILINE)


def test_the_error_of_a_failed_run_is_shown(tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    with pytest.raises(PluginError):
        trained(tmp_path / "one", plugins=[str(tmp_path / "fails.py")])
    (row,) = json.loads(said(runs, tmp_path, "--json"))
    assert (row["state"], row["step"]) == ("failed", 4)
    assert "no more" in row["error"]
    assert (
        said(watch, tmp_path / "one").splitlines()[-1]
        == f"{tmp_path / 'one'}: failed: {row['error']}"
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"outcome": "eaten"}', '{"outcome": []}', "\0"]
)
def test_a_damaged_outcome_counts_as_missing(copies, text):
    (copies[0] / "outcome.json").write_text(text)
    assert (read(copies[0]).state, read(copies[0]).step) == ("killed", 8)
    assert read(copies[0]).error is None


def test_a_killed_run_is_as_far_as_its_last_row_or_its_newest_checkpoint(copies):
    (copies[0] / "outcome.json").unlink()
    shutil.rmtree(copies[0] / "checkpoints" / "step-00000008")
    path = copies[0] / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:40])
    record = read(copies[0])
    assert (record.state, record.step, record.share) == ("killed", 4, 0.5)
    path.unlink()
    assert (read(copies[0]).step, read(copies[0]).share) == (4, 0.5)
    assert re.search(r"^slow +killed +4 +50%", said(runs, copies[0].parent), re.MULTILINE)


def unlogged(folder, tmp_path):
    """Train a tiny run without a plugin that writes rows."""
    (tmp_path / "parts.py").write_text(LOCAL)
    settings = {
        "plugins": [str(tmp_path / "parts.py"), "checkpoint"],
        "run": {"length": 8, "device": "cpu"},
        "checkpoint": {"every": 4},
    }
    train(settings, run_dir=folder)
    return folder


def test_a_run_without_jsonl_is_shown_with_its_step_and_the_reason_for_no_rows(tmp_path):
    one = unlogged(tmp_path / "runs" / "one", tmp_path)
    reason = "no rows: jsonl is not listed"
    listed = said(runs, tmp_path / "runs")
    assert re.search(r"^one +finished +8 +100% ", listed, re.MULTILINE)
    assert listed.endswith(f"\none: {reason}\n")
    (row,) = json.loads(said(runs, tmp_path / "runs", "--json"))
    assert (row["step"], row["note"]) == (8, reason)
    assert said(watch, one) == f"{reason}; the last step is 8\n{one}: finished\n"
    compared = said(compare, one)
    assert re.search(r"^step +8 *$", compared, re.MULTILINE)
    assert compared.endswith(f"\none: {reason}\n")
    (one / "outcome.json").unlink()  # as after kill -9
    assert re.search(r"^one +killed +8 ", said(runs, tmp_path / "runs"), re.MULTILINE)


def test_a_start_that_failed_is_listed_as_failed_before_its_first_step(tmp_path):
    settings = {"plugins": ["text", "gpt", "adamw"], "run": {"length": 8, "device": "cpu"}}
    with pytest.raises(DataError):
        train(settings | {"text": {"path": str(tmp_path / "none")}}, run_dir=tmp_path / "r" / "one")
    (row,) = json.loads(said(runs, tmp_path / "r", "--json"))
    assert (row["state"], row["step"]) == ("failed before its first step", 0)
    assert "none" in row["error"]
    assert "failed before its first step" in said(watch, tmp_path / "r" / "one")


def test_a_run_without_a_row_is_shown(copies):
    (copies[0] / "metrics.jsonl").unlink()
    assert (read(copies[0]).step, read(copies[0]).written) == (8, None)
    assert said(runs, copies[0].parent).endswith("\nslow: no rows\n")
    printed = said(compare, copies[0], "--curve", "train/loss")
    assert re.search(r"^step +8 *$", printed, re.MULTILINE)
    assert printed.endswith("\nslow: no rows\n")
    assert "┌" in said(compare, *copies)  # the other one has a curve


@given(st.binary(max_size=80))
def test_no_line_of_a_metrics_file_raises_an_error(line):
    assert parse_row(line) is None or isinstance(parse_row(line), Row)


def test_a_damaged_line_is_skipped_and_null_is_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = '{"time": 1.0, "step": 1, "tokens": 4, "metrics": {"train/loss": null}}\n'
    path.write_bytes(
        good.encode() + b"\x00\xff\n[]\n{}\n" + good.replace('"step": 1', '"step": 2').encode()
    )
    assert [row.step for row in run_folder.rows(path.parent)] == [1, 2]
    assert all(
        row.metrics["train/loss"] != row.metrics["train/loss"]
        for row in run_folder.rows(path.parent)
    )


def test_settings_that_cannot_be_read_are_an_error_that_names_the_folder(copies):
    (copies[0] / "settings.toml").write_text("[run\n")
    assert str(copies[0]) in said(compare, copies[0], fails=StorageError)


def test_only_the_settings_that_differ_are_compared(two):
    found = differences([read(one) for one in two])
    assert found["parts.lr"] == ["0.01", "0.1"]
    assert set(found) <= {"parts.lr", "run.name"}


def test_last_and_best_metrics_stand_side_by_side(two):
    shown = said(compare, *two, "--metric", "val/loss", "--curve", "train/loss")
    record = read(two[1])
    step, value = record.best("val/loss")
    assert f"{value:.6g} (step {step})" in shown
    assert f"{record.last('val/loss'):.6g}" in shown
    assert re.search(r"^metric +slow +fast", shown, re.MULTILINE)


def test_an_unknown_metric_is_an_error_that_lists_the_known_ones(two):
    text = said(compare, *two, "--metric", "val/los", fails=SettingsError)
    assert "val/los: none of the runs has logged it" in text
    assert "val/loss" in text


@pytest.mark.parametrize("option", ["--metric", "--curve"])
def test_an_unknown_metric_is_refused_before_anything_is_shown(two, option):
    done = CliRunner().invoke(compare, [*map(str, two), option, "val/los"])
    assert isinstance(done.exception, SettingsError)
    assert done.output == ""


def logged(folder, *metrics):
    """Put rows with these metrics, as JSON, in place of those of a run."""
    rows = [
        f'{{"time": {n}.5, "step": {n}, "tokens": {n}, "metrics": {one}}}\n'
        for n, one in enumerate(metrics, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(rows))


@pytest.mark.parametrize("bad", ['"Infinity"', '"-Infinity"', '"NaN"', "1e999"])
def test_a_run_that_diverged_is_compared_by_its_finite_values(copies, bad):
    logged(copies[0], '{"train/loss": 2.5}', f'{{"train/loss": {bad}}}')
    assert curve(read(copies[0]), "train/loss", "step", 0.5).y == [2.5]
    assert read(copies[0]).best("train/loss") == (1, 2.5)
    printed = said(compare, *copies, "--curve", "train/loss")
    assert "2.5 (step 1)" in printed
    assert "┌" in printed


@pytest.mark.parametrize("bad", ['"Infinity"', '"-Infinity"', '"NaN"'])
def test_where_no_value_is_finite_there_is_no_best_and_no_curve(copies, tmp_path, bad):
    logged(copies[0], f'{{"val/loss": {bad}}}')
    printed = said(compare, copies[0])
    assert re.search(r"^val/loss best +- *$", printed, re.MULTILINE)
    assert printed.endswith("\nval/loss: no finite value to draw\n")
    path = tmp_path / "losses.svg"
    assert "no finite value" in said(compare, copies[0], "-o", path, fails=DataError)
    assert not path.exists()
    rows = json.loads(said(runs, copies[0].parent, "--json"), parse_constant=pytest.fail)
    assert [row["best"] for row in rows if row["run"] == "slow"] == [None]


@pytest.mark.parametrize("name", ["h.[ab].weight", "[/x]", "[red]x[/red]", ":smile:", "[link=a]b"])
def test_names_and_values_are_shown_as_they_are(copies, name):
    logged(copies[0], json.dumps({name: 2.0}))
    tables = (copies[0] / "settings.toml").read_text()
    (copies[0] / "settings.toml").write_text(tables + f"\n[other]\nfreeze = [{json.dumps(name)}]\n")
    named = copies[0].rename(copies[0].parent / name.replace("/", "_"))
    printed = said(compare, copies[1], named)
    assert f"{name} last" in printed
    assert re.search(rf"^other.freeze +- +{re.escape(name)}$", printed, re.MULTILINE)
    assert re.search(rf"^metric +fast +{re.escape(named.name)}", printed, re.MULTILINE)
    listed = said(runs, copies[1].parent, "--metric", name)
    assert f"best {name}" in listed
    assert f"\n{named.name} " in listed


def test_a_name_that_is_no_formula_is_in_a_picture_all_the_same(copies, tmp_path):
    logged(copies[0], '{"$x^{$": 2.0}')
    said(
        compare, copies[0].rename(tmp_path / "a$^{$"), "--curve", "$x^{$", "-o", tmp_path / "a.svg"
    )
    assert "<!-- $x^{$ -->" in (tmp_path / "a.svg").read_text().replace("\\$", "$")


@pytest.mark.parametrize(
    ("one", "other"), [(1e308, -1e308), (9e299, -9e299), (5e-324, 0.0), (1e16, 1e16)]
)
def test_no_number_is_too_large_or_too_small_to_be_compared(copies, one, other):
    logged(copies[0], *(f'{{"val/loss": {value!r}}}' for value in (one, other, 1.0)))
    assert f"{min(one, other, 1.0):.6g} (step " in said(compare, copies[0])
    assert "val/loss best" in said(compare, copies[0], "--smooth", "0.9")


FOREIGN = [
    "a = 1\n",
    "run = 1\n",
    "[run]\n",
    "[run]\nlength = []\n",
    '[run]\nlength = "5 apples"\n',
]


@pytest.mark.parametrize("settings", FOREIGN)
def test_a_folder_of_something_else_ends_no_command_with_a_traceback(copies, settings):
    (copies[0] / "settings.toml").write_text(settings)
    (copies[0] / "outcome.json").unlink()
    assert read(copies[0]).share is None
    assert re.search(r"^slow +\S+ +8 +-", said(runs, copies[0].parent), re.MULTILINE)
    assert "val/loss best" in said(compare, *copies)
    assert "step 8:" in said(watch, copies[0])


def test_a_folder_that_cannot_be_read_hides_no_other(copies):
    (copies[0] / "settings.toml").write_bytes(b"a = \xff\n")
    done = CliRunner().invoke(runs, [str(copies[0].parent), "--json"])
    listed = {row["run"]: row for row in json.loads(done.stdout)}
    assert listed["slow"] == dict.fromkeys(listed["fast"]) | {
        "run": "slow",
        "state": "unreadable",
        "error": listed["slow"]["error"],
    }
    assert str(copies[0]) in listed["slow"]["error"]
    assert listed["fast"]["state"] == "finished"
    assert f"{copies[0]}/settings.toml: cannot be read" in done.stderr
    assert re.search("^slow +unreadable", said(runs, copies[0].parent), re.MULTILINE)


@pytest.mark.parametrize("time", ["1e300", '"NaN"', '"Infinity"'])
def test_a_row_of_no_time_at_all_is_listed_all_the_same(copies, time):
    (copies[0] / "metrics.jsonl").write_text(
        f'{{"time": {time}, "step": 1, "tokens": 4, "metrics": {{}}}}\n'
    )
    rows = json.loads(said(runs, copies[0].parent, "--json"))
    assert [row["written"] for row in rows if row["run"] == "slow"] == [None]


@pytest.mark.parametrize("axis", ["step", "tokens", "time"])
def test_curves_have_the_values_of_the_rows_over_every_axis(two, axis):
    record = read(two[0])
    made = curve(record, "val/loss", axis, 0.0)
    rows = list(run_folder.rows(two[0]))
    series = [(row, row.metrics["val/loss"]) for row in rows if "val/loss" in row.metrics]
    assert made.y == [value for _, value in series]
    expected = {
        "step": [row.step for row, _ in series],
        "tokens": [row.tokens for row, _ in series],
        "time": [row.time - rows[0].time for row, _ in series],
    }
    assert made.x == expected[axis]


@pytest.mark.parametrize(
    ("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".html", b"<!doctype html>")]
)
def test_pictures_are_what_their_names_say(two, tmp_path, suffix, begin):
    path = tmp_path / f"losses{suffix}"
    assert f"written: {path}" in said(compare, *two, "--smooth", "0.5", "-o", path)
    data = path.read_bytes()
    assert data.startswith(begin)
    if suffix != ".png":
        assert b"<svg" in data


def test_a_picture_of_another_form_or_place_is_an_error(two, tmp_path):
    assert "unknown form" in said(compare, *two, "-o", tmp_path / "losses.gif", fails=SettingsError)
    assert "cannot be written" in said(
        compare, *two, "-o", tmp_path / "gone" / "l.svg", fails=StorageError
    )


@given(st.lists(st.floats(-100, 100), min_size=1), st.floats(0, 0.99))
def test_smoothing_is_the_weighted_mean_of_what_came_before(values, weight):
    for n, found in enumerate(smoothed(values, weight)):
        weights = [weight ** (n - k) for k in range(n + 1)]
        expected = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert found == pytest.approx(expected, abs=1e-9)


LONG = 20_000
TEN = (
    "train/loss",
    "optim/lr",
    "optim/grad_norm",
    "train/tokens",
    "perf/mfu",
    *(f"a/b{n}" for n in range(5)),
)


def long_run(folder: Path, seed: int, rows: int = LONG) -> Path:
    """Write the folder of a run of many rows of ten metrics, some with an
    eleventh."""
    folder.mkdir(parents=True)
    (folder / "settings.toml").write_text(
        f'plugins = []\n[run]\nlength = "{rows} steps"\nseed = {seed}\n'
    )
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, rows + 1):
            values = [
                f'"{name}": {(step * 7919 + place + seed) % 10007 / 10007}'
                for place, name in enumerate(TEN)
            ]
            values += [f'"val/loss": {seed + 100 / step}'] if step % 100 == 0 else []
            file.write(
                f'{{"time": {step / 10}, "step": {step}, "tokens": {step * 8}, "metrics": {{{", ".join(values)}}}}}\n'
            )
    return folder


def test_curves_without_colours_are_distinguished_by_digits_and_only_what_can_be_better_has_a_best(
    two,
):
    printed = said(compare, *two)
    drawing = printed[printed.index("┌") :]
    assert {"1", "2"} <= set(re.sub(r"[\d.]+[┤┬]|[\w/-]{2,}", "", drawing))
    assert "val/loss best" in printed
    assert "train/tokens last" in printed
    assert not re.search("(optim|tokens).* best", printed)


def counted(call):
    """Return what a call returns, how many calls of functions it makes, and how many bytes it reads."""
    calls = 0

    def count(frame, event, what):
        nonlocal calls
        calls += event in ("call", "c_call")

    def read():
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read()
    sys.setprofile(count)
    try:
        found = call()
    finally:
        sys.setprofile(None)
    return found, calls, read() - before


def test_two_long_runs_are_compared_with_each_byte_read_once_and_no_call_for_each_row(
    tmp_path, monkeypatch
):
    """Counted, not timed: what is read, what is parsed, what Python calls, what is drawn."""
    from fundamentallm_runs import compare as comparing
    from fundamentallm_runs import metrics_file as rows

    folders = [long_run(tmp_path / name, seed) for seed, name in enumerate("ab")]
    halves = [long_run(tmp_path / name, seed, LONG // 2) for seed, name in enumerate("cd")]
    _, fewer, _ = counted(lambda: said(compare, *halves, "--curve", "train/loss"))
    size = sum((one / "metrics.jsonl").stat().st_size for one in folders)
    sizes, points = [], []
    loads, shown = rows.orjson.loads, comparing.drawn
    monkeypatch.setattr(
        rows, "orjson", SimpleNamespace(loads=lambda text: sizes.append(len(text)) or loads(text))
    )
    monkeypatch.setattr(
        comparing,
        "drawn",
        lambda curves, *more, **so: (
            points.extend(len(c.x) for c in curves) or shown(curves, *more, **so)
        ),
    )
    printed, calls, read = counted(lambda: said(compare, *folders, "--curve", "train/loss"))
    assert size <= read < size + 100_000  # what is small, too, such as the settings
    assert sum(sizes) < size + 2 * LONG + 100_000  # a comma between two lines
    assert calls - fewer < LONG / 2  # for LONG rows more
    assert len(points) == 2
    assert max(points) <= POINTS + 2
    assert re.search(r"^step +20000 +20000", printed, re.MULTILINE)
    assert re.search(
        r"^val/loss best +0\.005 \(step 20000\) +1.005 \(step 20000\)", printed, re.MULTILINE
    )


def test_columns_take_few_bytes_for_each_number(tmp_path):
    path = long_run(tmp_path / "a", 0) / "metrics.jsonl"
    gathered(path)  # names of metrics are kept by the parser
    tracemalloc.start()
    columns = gathered(path)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 30 * 8 * LONG
    assert columns.names == {*TEN, "val/loss"}


def columns_of(metrics):
    columns = Columns()
    for n, one in enumerate(metrics):
        columns.add(Row(n, 0, 0.0, one))
    return columns


NUMBERS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 2**70) | st.booleans()
WHOLE = st.fixed_dictionaries(
    {
        "step": st.integers(0, 99),
        "tokens": st.integers(0, 99),
        "time": st.floats(0, 9),
        "metrics": st.dictionaries(st.sampled_from("abc"), NUMBERS),
    }
)
ODD = st.sampled_from(
    [
        None,
        "NaN",
        "x",
        "\ud800",
        True,
        1.5,
        1e13,
        [1],
        {"a": 1},
        10**30,
        10**400,
        math.nan,
        -math.inf,
    ]
)
LINES = st.lists(
    st.one_of(
        WHOLE.map(json.dumps),
        st.builds(
            lambda row, key, odd: json.dumps(row | {key: odd}),
            WHOLE,
            st.sampled_from(["step", "tokens", "time", "metrics"]),
            ODD,
        ),
        st.builds(
            lambda row, odd: json.dumps(row | {"metrics": {**row["metrics"], "d": odd}}), WHOLE, ODD
        ),
        WHOLE.map(lambda row: f"{json.dumps(row)}, {json.dumps(row)}"),
        st.builds(lambda row, end: json.dumps(row)[:end], WHOLE, st.integers(0, 60)),
        WHOLE.map(lambda row: json.dumps(row).replace('"time": ', '"time": 1e400, "x": ')),
        st.sampled_from(["", "[1", "2]", "{}", "1,2", '"', "\x00"]),
    ),
    max_size=12,
)


@given(LINES, st.booleans(), st.sampled_from([1, 100, 1000]))
def test_the_rows_of_many_lines_are_those_of_the_face_whatever_the_lines_are(lines, ends, part):
    from fundamentallm_runs import metrics_file as rows

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "PART", part)
        path = Path(folder) / "metrics.jsonl"
        path.write_text("\n".join(lines) + "\n" * ends)
        columns = Columns()
        for row in run_folder.rows(Path(folder)):
            columns.add(row)
        assert repr(gathered(path)) == repr(columns)


@given(
    st.lists(
        st.dictionaries(st.sampled_from("abc"), st.floats(allow_nan=False), max_size=3), max_size=20
    )
)
def test_a_column_has_the_values_of_the_rows_in_their_order_whatever_each_row_has(metrics):
    columns = columns_of(metrics)
    for name in "abc":
        places, values = columns.series(name)
        assert list(zip(places, values, strict=True)) == [
            (n, one[name]) for n, one in enumerate(metrics) if name in one
        ]
    assert columns.names == {name for one in metrics for name in one}


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["a", "b", "mfu"]), st.floats() | st.integers(0, 3).map(float)
        ),
        max_size=20,
    )
)
def test_the_last_and_the_best_are_those_of_the_whole_column_whatever_each_row_has(metrics):
    columns = columns_of(metrics)
    record = Record(Path("x"), {}, {}, columns)
    for name, better in (("a", min), ("mfu", max)):
        values = {n: one[name] for n, one in enumerate(metrics) if name in one}
        finite = {n: value for n, value in values.items() if math.isfinite(value)}
        assert repr(record.last(name)) == repr(values[max(values)] if values else None)
        step = better(finite, key=finite.get, default=None)  # the first of equals
        assert record.best(name) == (None if step is None else (step, finite[step]))


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=300), st.integers(2, 40))
def test_a_picture_of_a_long_curve_keeps_its_ends_and_its_highest_and_lowest_values(values, most):
    kept = extremes(values, most)
    assert len(kept) <= most + 2
    assert kept == sorted(set(kept))
    assert {kept[0], kept[-1]} == {0, len(values) - 1}
    assert {min(values), max(values)} <= {values[place] for place in kept}


def test_rows_are_watched_as_they_come_until_the_run_ends(copies):
    path = copies[0] / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0])
    code = f"import fcntl, sys; f = open({str(copies[0] / '.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()

        def goes_on():
            with path.open("a") as file:
                for line in lines[1:]:
                    for part in (line[:20], line[20:]):
                        file.write(part)
                        file.flush()
                        time.sleep(0.02)
            holder.stdin.close()

        writer = threading.Thread(target=goes_on)
        writer.start()
        shown = said(watch, copies[0], "--metric", "train/loss", "--every", "0.01")
        writer.join()
    assert [line.split(":")[0] for line in shown.splitlines()[:-1]] == [
        "step 2",
        "step 4",
        "step 6",
        "step 8",
    ]
    assert shown.splitlines()[-1].endswith(": finished")
    assert "val/loss" not in shown


def test_rows_without_the_metric_are_not_shown(copies):
    assert said(watch, copies[0], "--metric", "nope") == f"{copies[0]}: finished\n"
    shown = said(watch, copies[0], "--metric", "val/loss").splitlines()
    assert [line.split(":")[0] for line in shown[:-1]] == ["step 4", "step 8"]


def line_of(step, value=1.5, end="\n"):
    return f'{{"time": 1.5, "step": {step}, "tokens": {step}, "metrics": {{"train/loss": {value}}}}}{end}'


def replaced(path, text):
    (path.parent / "temporary").write_text(text)
    (path.parent / "temporary").replace(path)


def test_a_file_that_was_replaced_is_watched_from_where_it_differs(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)

    def steps():
        return [(row.step, row.metrics["train/loss"]) for row in tail.rows()]

    assert steps() == []
    path.write_text("".join(map(line_of, (1, 2, 3))) + line_of(4)[:9])
    assert steps() == [(1, 1.5), (2, 1.5), (3, 1.5)]
    replaced(
        path, "".join(map(line_of, (1, 2))) + "".join(line_of(n, 2.5) for n in (3, 4, 5, 6))
    )  # longer
    assert steps() == [(3, 2.5), (4, 2.5), (5, 2.5), (6, 2.5)]
    replaced(path, line_of(1))
    assert steps() == []
    with path.open("a") as file:
        file.write(line_of(2, 3.5))
    assert steps() == [(2, 3.5)]
    path.write_text(line_of(7))  # cut in place
    assert steps() == [(7, 1.5)]
    assert steps() == []


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 3), max_size=4)), max_size=6))
def test_every_row_of_the_last_file_was_shown_in_its_order(looks):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        tail, shown = Tail(path), []
        content = ""
        for is_new_file, values in looks:
            lines = "".join(line_of(1, float(value)) for value in values)
            content = lines if is_new_file else content + lines
            replaced(path, content)
            shown += [row.metrics["train/loss"] for row in tail.rows()]
        last = [row.metrics["train/loss"] for row in map(parse_row, content.encode().splitlines())]
        left = iter(shown)
        assert all(value in left for value in last)


def test_a_run_is_repeated_bit_by_bit(two, tmp_path):
    shown = said(rerun, two[0], "--run-dir", tmp_path / "again")
    assert "metrics: 4 rows, identical" in shown
    assert re.search(r"weights: \d+ tensors, identical", shown)
    assert "the run is reproduced" in shown
    assert "was" not in shown  # the same versions


def test_a_difference_is_named_and_ends_with_exit_code_1(two, tmp_path):
    done = CliRunner().invoke(
        rerun, [str(two[0]), "--run-dir", str(tmp_path / "again"), "--set", "parts.noise=true"]
    )
    assert done.exit_code == 1
    assert "first differs at step" in done.output
    assert "the run is not reproduced" in done.output


def test_a_run_is_repeated_without_a_plugin_and_with_another(two, tmp_path):
    words = ["--no-plugin", "checkpoint", "--plugin", "csv"]
    printed = said(rerun, two[0], "--run-dir", tmp_path / "again", *words)
    assert "metrics: 4 rows, identical" in printed
    assert (tmp_path / "again" / "metrics.csv").is_file()
    assert not (tmp_path / "again" / "checkpoints").exists()


def test_without_a_checkpoint_only_the_metrics_are_compared(copies, tmp_path):
    shutil.rmtree(copies[0] / "checkpoints")
    shown = said(rerun, copies[0], "--run-dir", tmp_path / "again")
    assert (
        "metrics: 4 rows, identical\nweights: none were saved to compare with\nthe metrics are reproduced; nothing else was compared"
        in shown
    )


def test_weights_in_another_folder_are_not_said_to_be_unsaved(copies, tmp_path):
    (copies[0] / "checkpoints").rename(tmp_path / "elsewhere")
    (copies[0] / "checkpoint-folders").write_text(f"{tmp_path / 'elsewhere'}\n")
    shown = said(rerun, copies[0], "--run-dir", tmp_path / "again")
    assert "weights: they are in another folder" in shown
    assert "the run is reproduced" not in shown


def test_where_nothing_can_be_compared_nothing_is_said_to_be_reproduced(copies, tmp_path):
    shutil.rmtree(copies[0] / "checkpoints")
    (copies[0] / "metrics.jsonl").unlink()
    done = CliRunner().invoke(rerun, [str(copies[0]), "--run-dir", str(tmp_path / "again")])
    assert done.exit_code == 1
    assert done.output.endswith("nothing was compared\n")


def test_a_metric_that_only_one_run_has_is_a_difference(copies, tmp_path):
    path = copies[0] / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["metrics"] |= {"val/other": None}
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    done = CliRunner().invoke(rerun, [str(copies[0]), "--run-dir", str(tmp_path / "again")])
    assert f"val/other first differs at step {rows[1]['step']}: was nan, is 'absent'" in done.output
    assert done.exit_code == 1


def test_a_checkpoint_that_cannot_be_read_is_an_error_before_anything_is_trained(copies, tmp_path):
    for path in (copies[0] / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"x" * path.stat().st_size)
    said(rerun, copies[0], "--run-dir", tmp_path / "again", fails=FundamentalError)
    assert not (tmp_path / "again").exists()


def test_weights_are_the_same_if_their_bits_are():
    torch = pytest.importorskip("torch")
    nan, zero = torch.tensor([float("nan"), 1.0]), torch.tensor(0.0)
    old = {
        "a": nan,
        "b": zero,
        "c": torch.zeros(0),
        "d": torch.ones(2, 2).T,
        "e": zero.bfloat16(),
        "f": zero == 0,
    }
    assert different_weights(old, {n: t.clone() for n, t in old.items()}) == Comparison(
        "weights", "identical", "6 tensors, identical"
    )
    assert different_weights({"b": zero}, {"b": -zero}) == Comparison(
        "weights", "different", "b differs"
    )
    assert different_weights({"b": zero}, {"b": zero.double()}) == Comparison(
        "weights", "different", "b differs"
    )
    assert different_weights({"a": nan}, {"a": nan[:1]}) == Comparison(
        "weights", "different", "a differs"
    )


def test_weights_that_only_one_of_the_runs_has_are_named():
    first, repeated = different_weights({"a": None}, {}), different_weights({}, {"a": None})
    assert (first.outcome, first.text) == ("different", "only the first run has a")
    assert (repeated.outcome, repeated.text) == ("different", "only the repeated run has a")


def test_other_versions_are_named(copies, tmp_path):
    path = copies[0] / "environment.json"
    kept = json.loads(path.read_text())
    kept["versions"]["torch"] = "1.0"
    kept["threads"] += 3  # which may change how sums are taken apart
    path.write_text(json.dumps(kept))
    shown = said(rerun, copies[0], "--run-dir", tmp_path / "x")
    assert re.search(r"^torch: was 1\.0, is \d", shown, re.MULTILINE)
    assert f"\nthreads: was {kept['threads']}, is {kept['threads'] - 3}\n" in shown


def test_a_local_file_that_only_one_of_the_runs_uses_is_reported(copies, tmp_path):
    path = copies[0] / "environment.json"
    kept = json.loads(path.read_text())
    old = {"/a/parts.py": {"sha256": "1", "copy": "code/a/parts.py"}}
    for changed, line in (
        (old, "/a/parts.py: is used by the first run only"),
        ({}, None),
    ):
        path.write_text(json.dumps(kept | {"code": kept.get("code", {}) | changed}))
        shown = said(rerun, copies[0], "--run-dir", tmp_path / f"x{len(changed)}")
        assert (line in shown) if line else ("/a/parts.py" not in shown)


def test_a_local_file_that_was_edited_since_the_run_is_reported_with_its_copy(tmp_path):
    first = trained(tmp_path / "mine" / "first")
    file = tmp_path / "mine" / "parts.py"
    file.write_text(LOCAL.replace("lr=self.lr", "lr=self.lr * 2"))
    shown = said(rerun, first, "--run-dir", tmp_path / "again")
    copy = first / "code" / "mine" / "parts.py"
    assert f"{file}: has changed since the run; the old version is {copy}\n" in shown
    assert copy.read_text() == LOCAL
    assert "optim/lr first differs at step 2: was 0.1, is 0.2" in shown
    assert "was changed or removed" not in shown


def test_a_local_file_that_was_edited_between_start_and_resume_is_reported_with_its_copy(tmp_path):
    first = trained(tmp_path / "mine" / "first")
    file = tmp_path / "mine" / "parts.py"
    file.write_text(LOCAL + "# edited\n")
    train(first / "settings.toml", overrides=["run.length=12"], run_dir=first)
    shown = said(rerun, first, "--run-dir", tmp_path / "again")
    copy = first / "code" / "until-step-00000008" / "mine" / "parts.py"
    expected = "was changed or removed at step 8 of the run; the version until then is"
    assert f"mine/parts.py: {expected} {copy}\n" in shown
    assert copy.read_text() == LOCAL
    assert "has changed since the run" not in shown


def test_a_folder_with_files_is_not_trained_into(two, tmp_path):
    (tmp_path / "kept").touch()
    assert "is not empty" in said(rerun, two[0], "--run-dir", tmp_path, fails=SettingsError)


def test_a_killed_run_is_compared_up_to_its_last_row(copies, tmp_path):
    for name in ("outcome.json", "checkpoints/step-00000008"):
        path = copies[0] / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    rows = copies[0] / "metrics.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:3]))
    printed = said(rerun, copies[0], "--run-dir", tmp_path / "again")
    assert "did not come to its end (killed): it is compared up to step 6" in printed
    assert (
        "metrics: 3 rows, identical\nweights: 4 tensors, identical\nthe run is reproduced"
        in printed
    )


def test_a_checkpoint_that_the_repeated_run_did_not_keep_is_not_compared(copies, tmp_path):
    shutil.rmtree(copies[0] / "checkpoints" / "step-00000008")
    printed = said(
        rerun, copies[0], "--run-dir", tmp_path / "again", "--set", 'checkpoint.every="8 steps"'
    )
    assert (
        "weights: the repeated run has kept none of step 4 to compare with\nthe metrics are reproduced; nothing else was compared"
        in printed
    )


def test_a_run_that_finished_is_compared_to_its_last_row(copies, tmp_path):
    rows = copies[0] / "metrics.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:3]))
    printed = said(rerun, copies[0], "--run-dir", tmp_path / "again")
    assert "metrics: only the repeated run has a row at step 8" in printed
    assert "the run is not reproduced" in printed


def test_a_failure_is_repeated(tmp_path):
    (tmp_path / "fails.py").write_text(FAILS)
    with pytest.raises(PluginError):
        trained(tmp_path / "one", plugins=[str(tmp_path / "fails.py")])
    printed = said(rerun, tmp_path / "one", "--run-dir", tmp_path / "again")
    assert re.search("^the run fails again: .*no more", printed, re.MULTILINE)
    assert "metrics: 2 rows, identical" in printed
    (tmp_path / "fails.py").write_text(FAILS.replace("== 4", "== 99"))
    printed = said(rerun, tmp_path / "one", "--run-dir", tmp_path / "heals")
    assert "did not come to its end (failed): it is compared up to step 4" in printed
    assert "fails again" not in printed
    (tmp_path / "fails.py").write_text(FAILS.replace("== 4", "== 2"))
    shutil.rmtree(tmp_path / "again")
    printed = said(rerun, tmp_path / "one", "--run-dir", tmp_path / "again")
    assert "metrics: only the first run has a row at step 4" in printed


def test_a_run_that_finished_and_fails_now_ends_with_that_error(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    one = trained(folder / "one", plugins=[])
    (folder / "parts.py").write_text(
        LOCAL.replace("if self.noise:", "raise ValueError('no more')\n        if self.noise:")
    )
    assert "no more" in said(rerun, one, fails=PluginError)


def test_a_run_of_objects_is_refused_with_their_names_before_anything_is_made(tmp_path):
    given = [TinyData(), TinyModel(), TinyOptimizer()]
    train(
        {"plugins": ["jsonl"], "run": {"length": 2, "device": "cpu"}},
        run_dir=tmp_path / "one",
        plugins=given,
    )
    path = tmp_path / "one" / "environment.json"
    kept = json.loads(path.read_text())
    facts = {name: {"kind": "object", "name": "a_module"} for name in kept["plugins"]}
    facts["jsonl"] = {"kind": "distribution", "name": "fundamentallm-jsonl", "version": "0.1.0"}
    path.write_text(json.dumps(kept | {"plugins": facts}))
    printed = said(rerun, tmp_path / "one", fails=SettingsError)
    assert "tiny_data, tiny_model, tiny_optimizer came as Python objects" in printed
    assert "fundamentallm compare" in printed
    assert not (tmp_path / "one-rerun").exists()


def test_repeating_a_continued_run_prints_that_it_was_continued(copies, tmp_path):
    path = copies[0] / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": time.time()}))
    printed = said(rerun, copies[0], "--run-dir", tmp_path / "again")
    assert "the run was continued: the settings and versions of before" in printed
    assert "was continued" not in said(rerun, copies[1], "--run-dir", tmp_path / "other")


def test_data_that_are_no_longer_the_same_are_named(copies, tmp_path):
    assert data_change(Saved(8, {}, "small"), SimpleNamespace(data=TinySamples(4, "cpu"))) == [
        "data: are not what they were: their fingerprint was small, is tiny"
    ]
    assert data_change(Saved(8, {}, "tiny"), SimpleNamespace(data=TinySamples(4, "cpu"))) == []
    assert data_change(newest_saved(copies[1]), SimpleNamespace(data=TinySamples(4, "cpu"))) == []
    assert newest_saved(copies[1]).data == "tiny"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"versions": 3, "plugins": ["x"], "started": "s", "command": 4}',
        '{"plugins": {"a": 1}}',
    ],
)
def test_a_damaged_environment_does_not_prevent_a_rerun(copies, tmp_path, text):
    (copies[0] / "environment.json").write_text(text)
    printed = said(rerun, copies[0], "--run-dir", tmp_path / "again")
    assert printed.endswith("the run is reproduced\n")
    assert ("no record of them" in printed) == (text in ("", "[]", "{}"))


def test_a_run_is_repeated_from_its_own_folder(copies, monkeypatch):
    monkeypatch.chdir(copies[0])
    assert "is reproduced" in said(rerun, ".")
    assert (copies[0].parent / "slow-rerun" / "metrics.jsonl").exists()


def test_a_repetition_that_is_interrupted_compares_nothing(tmp_path):
    signals = "import os, signal\n        if run.progress.step == 5: os.kill(os.getpid(), signal.SIGTERM)\n        if self.noise:"
    made = tmp_path / "mine"
    made.mkdir()
    one = trained(made / "one")
    (made / "parts.py").write_text(LOCAL.replace("if self.noise:", signals))
    done = CliRunner().invoke(rerun, [str(one)])
    assert done.exit_code == 143
    assert "interrupted at step 6: there is nothing to compare yet" in done.output
    assert "reproduced" not in done.output


def test_a_file_is_no_folder_to_train_into(copies):
    done = CliRunner().invoke(
        rerun, [str(copies[0]), "--run-dir", str(copies[0] / "settings.toml")]
    )
    assert done.exit_code == 2
    assert "is a file" in done.output
