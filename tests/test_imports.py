"""What must not be imported early is not: a command line that answers at once needs no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"torch", "numpy", "mlflow", "matplotlib", "pandas", "rich", "tokenizers", "sklearn"}

PLUGIN = '''
from __future__ import annotations
from typing import TYPE_CHECKING
from fundamentallm import hookimpl, plugin
if TYPE_CHECKING:
    from fundamentallm import Data, Run
@plugin
class Parts:
    """What a run cannot do without."""
    @hookimpl
    def build_data(self, run: Run) -> Data:
        import torch
    @hookimpl
    def build_model(self): ...
    @hookimpl
    def build_optimizer(self): ...
'''


def imported(folder: Path, *command: str) -> tuple[set[str], str]:
    """Return the top-level modules that a Python command imports, and what it prints."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    lines = [
        line.rpartition("|") for line in done.stderr.splitlines() if line.startswith("import time:")
    ]
    assert done.returncode == 0, done.stderr
    return {name.strip().partition(".")[0] for _, _, name in lines}, done.stdout


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    (tmp_path / "parts.py").write_text(PLUGIN)
    path = tmp_path / "light.toml"
    path.write_text("plugins = ['parts.py']\n[run]\nlength = 5\n")
    return path


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        (("--help",), "train"),
        (("--version",), "version"),
        (("plugins",), ""),
        (("plugins", "--json"), "["),
        (("show", "light.toml"), 'length = "5 steps"'),
        (("hooks",), "build_data"),
        (("hooks", "light.toml"), "parts"),
    ],
)
def test_commands_that_do_not_train_import_nothing_heavy(
    settings: Path, command: tuple[str, ...], printed: str
) -> None:
    modules, output = imported(settings.parent, "-m", "fundamentallm", *command)
    assert printed in output
    assert "fundamentallm" in modules, "the check sees what is imported"
    assert modules & HEAVY == set()


def test_showing_the_settings_of_this_repository_imports_nothing_heavy() -> None:
    root = Path(__file__).parent.parent
    modules, output = imported(root, "-m", "fundamentallm", "show", "settings/tiny.toml")
    assert "[gpt]" in output
    assert "fundamentallm_gpt" in modules
    assert modules & HEAVY == set()


def test_the_face_imports_nothing_heavy_until_something_is_trained(tmp_path: Path) -> None:
    modules, _ = imported(tmp_path, "-c", "from fundamentallm import Run, compose, plugin")
    assert modules & HEAVY == set()


def test_importing_it_does_nothing(tmp_path: Path) -> None:
    code = (
        "import logging, random, signal; before = random.getstate()\n"
        "import fundamentallm, fundamentallm.launch, fundamentallm.cli\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert logging.getLogger().handlers == []\n"
        "assert random.getstate() == before\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []
