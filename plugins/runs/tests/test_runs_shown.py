"""What the commands show in terminals of any width, in any encoding, of runs of any name."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from fundamentallm import SettingsError
from fundamentallm_runs import compare as comparing
from fundamentallm_runs import tables
from fundamentallm_runs.cli import compare, runs, watch
from fundamentallm_runs.console_io import replace_unknown_characters
from fundamentallm_runs.curves import Curve, drawn


def made(folder: Path, seed: int = 1) -> Path:
    """Write the folder of a run of four rows."""
    folder.mkdir(parents=True)
    (folder / "settings.toml").write_text(f'[run]\nlength = "4 steps"\nseed = {seed}\n')
    rows = (
        {"time": step, "step": step, "tokens": 8 * step, "metrics": {"val/loss": seed / step}}
        for step in range(1, 5)
    )
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def said(command, *words):
    done = CliRunner().invoke(command, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.output


def shown(width, monkeypatch, command, *words):
    """Return what a command prints into a terminal of a width, without its colours."""
    monkeypatch.setattr(
        tables,
        "console",
        lambda _: tables.Console(width=width, markup=False, emoji=False, highlight=False),
    )
    return said(command, *words)


def drawing(printed):
    return printed[printed.index("┌") :]


def test_runs_of_the_same_name_have_different_names_in_table_and_drawing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = said(compare, made(Path("a/one")), made(Path("b/one"), 2))
    assert re.search("^setting +a/one +b/one", printed, re.MULTILINE)
    assert "1 a/one" in drawing(printed)
    assert "2 b/one" in drawing(printed)


def test_a_run_that_is_named_by_dots_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(made(tmp_path / "here"))
    made(tmp_path / "there")
    assert re.search("^setting +here +there", said(compare, ".", "../there"), re.MULTILINE)


def test_a_run_that_is_given_twice_is_drawn_once(tmp_path):
    one = made(tmp_path / "one")
    assert "2 " + str(one) not in said(compare, one, one)


def test_a_link_to_a_run_keeps_the_name_it_has(tmp_path):
    made(tmp_path / "run-7")
    (tmp_path / "latest").symlink_to("run-7")
    assert re.search("^latest +killed", said(runs, tmp_path), re.MULTILINE)


@pytest.mark.parametrize("width", [40, 80, 140])
def test_of_any_number_of_runs_every_value_is_shown_whole_in_any_width(
    tmp_path, monkeypatch, width
):
    folders = [made(tmp_path / f"run-{seed:03}", seed) for seed in range(1, 101)]
    printed = shown(width, monkeypatch, compare, *folders)
    assert max(map(cell_len, printed.partition("┌")[0].splitlines()[:-2])) <= width
    words = printed.split()
    assert [word for word in words if re.fullmatch(r"run-\d+", word)][:100] == [
        one.name for one in folders
    ]
    assert "…" not in printed
    tabulated = re.findall("^run.seed +(.+)", printed, re.MULTILINE)
    assert " ".join(tabulated).split() == [str(seed) for seed in range(1, 101)]


def test_in_a_narrow_terminal_no_value_of_the_list_is_cut(tmp_path, monkeypatch):
    made(tmp_path / "a-run-of-some-name")
    printed = shown(40, monkeypatch, runs, tmp_path)
    assert {"a-run-of-some-name", "killed", "100%", "0.25"} <= set(printed.split())
    assert "…" not in printed


@given(st.lists(st.integers(0, 200), min_size=1), st.integers(10, 200))
def test_each_column_is_in_one_part_behind_the_first_and_each_part_has_room(widths, room):
    found = tables.parts(widths, room)
    assert [place for part in found for place in part[1:]] == list(range(1, len(widths)))
    for part in found:
        assert part[0] == 0
        least = [min(widths[place], (room - tables.GAP) // 2) for place in part]
        assert sum(least) + tables.GAP * (len(part) - 1) <= room


@pytest.mark.parametrize("colours", [True, False])
def test_many_curves_are_named_below_the_drawing_by_marks_of_their_own(colours):
    printed = drawn([Curve(f"n{n}", [0.0], [float(n)]) for n in range(20)], "m", "step", colours)
    assert printed.endswith(
        "  9 n8  0 n9  a n10  b n11  c n12  d n13  e n14  f n15  g n16  h n17  i n18  j n19\n"
    )
    few = drawn([Curve(f"n{n}", [0.0], [float(n)]) for n in range(8)], "m", "step", colours=False)
    assert all(f"{mark} n{n}" in few for n, mark in enumerate("12345678"))


def test_without_colours_no_code_of_a_colour_is_drawn():
    both = [Curve("one", [0.0, 1.0], [0.0, 1.0]), Curve("other", [0.0, 1.0], [1.0, 0.0])]
    assert "\033" not in drawn(both, "m", "step", colours=False)
    assert "\033" in drawn(both, "m", "step", colours=True)


@pytest.mark.parametrize("no_colour", [True, False])
def test_a_terminal_without_colours_gets_none(tmp_path, monkeypatch, no_colour):
    asked = []
    monkeypatch.setattr(
        tables,
        "console",
        lambda _: tables.Console(
            width=80,
            force_terminal=True,
            color_system="256",
            no_color=no_colour,
            file=io.StringIO(),
        ),
    )
    monkeypatch.setattr(comparing, "drawn", lambda *_, colours: asked.append(colours) or "")
    said(compare, made(tmp_path / "one"))
    assert asked == [not no_colour]


def test_a_picture_of_another_form_is_refused_before_anything_is_read(tmp_path):
    done = CliRunner().invoke(compare, [str(made(tmp_path / "one")), "-o", "x.gif"])
    assert isinstance(done.exception, SettingsError)
    assert done.output == ""


@pytest.mark.parametrize("axis", ["step", "tokens", "time"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"time": "nan"},
        {"time": 1e308},
        {"time": -1e308},
        {"tokens": "1" + 400 * "0"},
        {"tokens": "7"},
        {"tokens": 1e300},
        {"step": "5"},
        {"step": 5.5},
        {"step": None},
        {"time": None},
    ],
    ids=str,
)
def test_a_row_with_numbers_that_no_logger_writes_is_passed_over(tmp_path, wrong, axis):
    folder = made(tmp_path / "a")
    before = said(compare, folder, "--x", axis)
    rows = folder / "metrics.jsonl"
    row = {"time": 5, "step": 5, "tokens": 40, "metrics": {"val/loss": 9.0}}
    for content in (row | wrong, row | wrong | {"metrics": {"other": 1.0}}):
        rows.write_text(rows.read_text() + json.dumps(content) + "\n")
    assert said(compare, folder, "--x", axis) == before


def test_names_that_begin_with_an_underscore_are_in_the_legend_of_a_picture(tmp_path, recwarn):
    said(compare, made(tmp_path / "_a"), made(tmp_path / "_b", 2), "-o", tmp_path / "o.svg")
    assert {"_a", "_b"} <= set(re.findall(r"<!-- (\S+) -->", (tmp_path / "o.svg").read_text()))
    assert [str(one.message) for one in recwarn] == []


@pytest.mark.parametrize(
    "words",
    [
        (compare, "--smooth", "nan"),
        (watch, "--every", "nan"),
        (watch, "--every", "-1"),
        (watch, "--every", "inf"),
    ],
)
def test_a_number_that_is_none_or_out_of_range_is_refused(tmp_path, words):
    command, *more = words
    done = CliRunner().invoke(command, [str(made(tmp_path / "one")), *more])
    assert done.exit_code == 2
    assert "Invalid value for" in done.output


@pytest.mark.parametrize(
    "words", [("runs", "."), ("compare", "größe 🚀", b"\xff"), ("watch", b"\xff")]
)
def test_no_name_is_beyond_any_encoding(tmp_path, words):
    """In a process of its own: of its output, only that one knows the encoding."""
    for name in ("größe 🚀", os.fsdecode(b"\xff")):
        made(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-m", "fundamentallm", *words],
        cwd=tmp_path,
        capture_output=True,
        env=dict(os.environ, PYTHONIOENCODING="ascii"),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"?" in done.stdout


def test_an_output_that_is_no_stream_of_text_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    replace_unknown_characters()
