"""A new plugin distribution, from nothing to a run that uses it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from fundamentallm import SettingsError
from fundamentallm_authoring.cli import new

SETTINGS = """
plugins = ["./tiny.py", "acme_noise"]
[run]
length = 4
[acme_noise]
scale = 0.5
"""
RUN = """
from fundamentallm import train
run = train("run.toml", run_dir="run")
print(run.outcome, run.plugins["acme_noise"].added, run.plugins["acme_noise"].scale)
"""


def test_a_new_plugin_installs_passes_its_tests_and_is_active_in_a_run(
    samples: Path, tmp_path: Path
) -> None:
    installed = str(tmp_path / "installed")
    paths = [installed, os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def succeed(*command: str, cwd: Path = tmp_path) -> str:
        words = [sys.executable, *command]
        done = subprocess.run(
            words, cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    work = tmp_path / "empty"
    work.mkdir()
    succeed("-m", "fundamentallm", "new", "acme-noise", cwd=work)
    succeed(
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        installed,
        "./acme-noise",
        cwd=work,
    )
    tested = succeed("-m", "pytest", "-q", cwd=work / "acme-noise")
    assert " passed" in tested
    (work / "tiny.py").write_text((samples / "tiny.py").read_text())
    (work / "run.toml").write_text(SETTINGS)
    assert succeed("-c", RUN, cwd=work).strip() == "finished 4 0.5"
    readme = str(work / "acme-noise" / "README.md")
    succeed("-m", "fundamentallm", "reference", "--readme", readme, "--check")


def test_the_files_are_named_by_the_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(new, ["big-red-button2"]).exit_code == 0
    project = tomllib.loads(Path("big-red-button2/pyproject.toml").read_text())["project"]
    assert project["name"] == "big-red-button2"
    assert project["entry-points"]["fundamentallm"] == {
        "big_red_button2": "big_red_button2:BigRedButton2"
    }
    assert "class BigRedButton2:" in Path("big-red-button2/big_red_button2/__init__.py").read_text()
    left = [p for p in Path().rglob("*") if p.is_file() and "$" in p.read_text()]
    assert not left


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Acme", "is no name for a distribution"),
        ("acme_noise", "is no name for a distribution"),
        ("../acme", "is no name for a distribution"),
        ("2acme", "is no name for a distribution"),
        ("class", "has a meaning already"),
        ("run", "has a meaning already"),
        ("json", "is installed already"),
        ("fundamentallm-authoring", "is installed already"),
    ],
)
def test_a_name_that_cannot_be_everything_is_refused(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(new, [name])
    assert isinstance(done.exception, SettingsError)
    assert said in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("acme-noise").mkdir()
    done = CliRunner().invoke(new, ["acme-noise"])
    assert "exists already" in str(done.exception)
    assert not list(Path("acme-noise").iterdir())
