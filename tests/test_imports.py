"""What must not be imported early is not: a command line that answers at once needs no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from fundamentallm import find_plugins

HEAVY = {"torch", "numpy", "mlflow", "matplotlib", "pandas", "rich", "tokenizers", "sklearn"}
LIBRARIES_OF_PLUGINS = {"tensorboard", "wandb", "pydantic", "safetensors", "plotext"}

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

# Each in a fork of one process: starting Python for each of them would take minutes.
EACH_ALONE = """
import importlib, os, sys
from importlib.metadata import entry_points
import fundamentallm

def compose(name):
    try:
        fundamentallm.compose({"plugins": [name], "run": {"length": 1}})
    except fundamentallm.SettingsError:
        pass  # it has no model, or needs settings

def help(command):
    command.load()(["--help"], standalone_mode=False)

def alone(name, act, given):
    if os.fork():
        os.wait()
        return
    sys.stdout = open(os.devnull, "w")
    act(given)
    modules = {module.partition(".")[0] for module in sys.modules}
    print(name, *modules, file=sys.__stdout__, flush=True)
    os._exit(0)

for name in fundamentallm.find_plugins():
    alone("plugin:" + name, compose, name)
for entry in entry_points(group="fundamentallm.commands"):
    alone("command:" + entry.name, help, entry)
for name in sys.argv[1:]:
    alone("module:" + name, importlib.import_module, name)
"""


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


def test_each_listed_plugin_and_the_help_of_each_command_imports_nothing_heavy(
    tmp_path: Path,
) -> None:
    modules = [f"fundamentallm_runs.{name}" for name in ("list_runs", "compare", "rerun")]
    modules += ["fundamentallm_tuning.batch_size_finder", "fundamentallm.folder"]
    words = [sys.executable, "-c", EACH_ALONE, *modules]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    found = {name: set(rest) for name, *rest in map(str.split, done.stdout.splitlines())}
    plugins = find_plugins()
    commands = metadata.entry_points(group="fundamentallm.commands")
    expected = [f"plugin:{name}" for name in plugins]
    expected += [f"command:{entry.name}" for entry in commands]
    assert sorted(found) == sorted(expected + [f"module:{name}" for name in modules]), done.stderr
    for name, offers in plugins.items():
        package = offers[0].load().__module__.partition(".")[0]
        assert package in found[f"plugin:{name}"], "the check sees what is imported"
    heavy = {name: names & (HEAVY | LIBRARIES_OF_PLUGINS) for name, names in found.items()}
    assert {name: names for name, names in heavy.items() if names} == {}


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
