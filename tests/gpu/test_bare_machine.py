"""A machine with Python, torch, pytest, hypothesis and numpy needs no installation to run the tests."""

from __future__ import annotations

import re
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401 - here, since what a run inside a test imports first is forgotten after it

sys.path.insert(0, str(Path(__file__).parent))  # scripts, not a package
import make_site

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

PROJECTS = [
    tomllib.loads(path.read_text())["project"]
    for path in [ROOT / "pyproject.toml", *sorted(ROOT.glob("plugins/*/pyproject.toml"))]
]
# What the machine has.
THERE = {"torch", "numpy", "pytest", "hypothesis"}
# Of loggers and of charts, which no test on a GPU uses.
LEFT_OUT = {"matplotlib", "mlflow", "tensorboard", "wandb"}


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def test_every_package_that_a_plugin_needs_is_packed_or_known_to_be_there():
    packed = {
        name_of(line)
        for line in (HERE / "packages.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    needed = {name_of(need) for project in PROJECTS for need in project.get("dependencies", [])}
    own = {project["name"] for project in PROJECTS}
    assert needed - own - THERE - LEFT_OUT <= packed
    pinned = {
        name_of(line).replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()
    }
    assert packed <= pinned


def test_the_site_has_the_entry_points_of_an_installation(tmp_path):
    make_site.make_site(tmp_path / "none", tmp_path)
    found = {one.name: one for one in metadata.distributions(path=[str(tmp_path)])}
    assert found.keys() == {project["name"] for project in PROJECTS}
    for name, made in found.items():
        installed = metadata.distribution(name)
        assert made.version == installed.version
        assert set(made.entry_points) == set(installed.entry_points)


def test_a_wheel_s_modules_go_where_the_wheel_says(tmp_path):
    wheel = tmp_path / "acme-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("acme/__init__.py", "")
        file.writestr("acme-1.0.dist-info/METADATA", "Name: acme\nVersion: 1.0\n")
        file.writestr("acme-1.0.data/platlib/acme/fast.so", "code")
        file.writestr("acme-1.0.data/scripts/acme", "program")
    make_site.unpack(wheel, tmp_path / "site")
    site = tmp_path / "site"
    found = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert found == {"acme/__init__.py", "acme/fast.so", "acme-1.0.dist-info/METADATA"}


SUITE = """
import os, signal, pytest

def test_short(): pass

@pytest.mark.cuda(seconds=60)
def test_long(record_property): record_property("ratio", 1.5)

@pytest.mark.cuda(seconds=1000)
def test_too_long(): pass

@pytest.mark.cuda(seconds=50)
def test_wrong(): assert False

@pytest.mark.cuda(seconds=1)
def test_interrupted(): os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.fixture
def outcomes(pytester: pytest.Pytester) -> Any:
    """Run tests of the suite with a limit of 900 seconds; return the exit code and the lines."""
    pytester.makeconftest(f"import sys; sys.path.insert(0, {str(HERE)!r})")
    pytester.makepyfile(test_suite=SUITE)  # -k also looks at the name of the file
    words = [
        "-p",
        "gpu_results",
        "--results",
        "out",
        "--time-limit",
        "900",
        "-p",
        "no:cacheprovider",
    ]

    def run(chosen: str) -> tuple[int, list[tuple[str, str, str]]]:
        options: Any = {"no_reraise_ctrlc": True}
        done = pytester.runpytest_inprocess(*words, "-k", chosen, **options)
        text = (pytester.path / "out" / "tests.txt").read_text()
        lines = re.findall(r"^(\w+) +[\d.]+ s  .*::(\w+)(.*)", text, re.MULTILINE)
        return int(done.ret), lines

    return run


def test_the_longest_tests_come_first_and_none_begins_that_would_not_end_in_time(outcomes: Any):
    code, lines = outcomes("not interrupted")
    assert code == pytest.ExitCode.TESTS_FAILED
    assert lines == [
        ("skipped", "test_too_long", ""),
        ("passed", "test_long", "  {'ratio': 1.5}"),
        ("failed", "test_wrong", ""),
        ("passed", "test_short", ""),
    ]


@pytest.mark.parametrize(("chosen", "code"), [("long", 1), ("long and not too", 0)])
def test_a_call_that_leaves_a_test_out_for_lack_of_time_has_failed(
    outcomes: Any, chosen: str, code: int
):
    assert outcomes(chosen)[0] == code


def test_a_test_that_is_cut_off_is_not_among_those_that_passed(outcomes: Any):
    code, lines = outcomes("long or interrupted")
    assert code == pytest.ExitCode.INTERRUPTED
    assert [line[:2] for line in lines] == [
        ("skipped", "test_too_long"),
        ("passed", "test_long"),
        ("unfinished", "test_interrupted"),
    ]
