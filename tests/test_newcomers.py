"""What someone sees whose own files are wrong: where, what came, what to do, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import pytest

MINE = '''
import torch
from torch.utils.data import DataLoader, Dataset
from fundamentallm import Batch, hookimpl, plugin
from fundamentallm.testing import TinyOptimizer

class Numbers(Dataset):
    def __len__(self):
        return 16
    def __getitem__(self, index):
        return read(index)

def read(index):
    return torch.full((8,), float(index))

class Source:
    epoch_samples, fingerprint = 16, "mine"
    def batches(self, progress):
        while True:
            for inputs in DataLoader(Numbers(), batch_size=4, num_workers=WORKERS):
                yield Batch((inputs, inputs.sum(1, keepdim=True)), 4, 4, 4)
    def validation(self):
        return {}

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(8, 1)
    def forward(self, inputs, targets):
        return (self.line(inputs) - targets).square().mean()

@plugin
class Mine:
    """A model and data of my own."""

    @hookimpl
    def build_data(self, run):
        return Source()
    @hookimpl
    def build_model(self):
        return Model()
    @hookimpl
    def build_optimizer(self, run):
        return TinyOptimizer().build_optimizer(run)
'''
SETTINGS = 'plugins = ["./mine.py"]\n[run]\nlength = 2\ndevice = "cpu"\n'
Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A plugin file of one's own, and settings in the same folder."""
    (tmp_path / "mine.toml").write_text(SETTINGS)
    (tmp_path / "mine.py").write_text(MINE.replace("WORKERS", "0"))
    return tmp_path / "mine.py"


@pytest.fixture
def call(tmp_path: Path) -> Call:
    """Return what calls the command line in a folder of one's own."""

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return forked.run(
            [sys.executable, "-m", "fundamentallm", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=240,
        )

    return call


def place(file: Path, code: str) -> str:
    """Return file and line of the first line that contains some code."""
    lines = file.read_text().splitlines()
    return f"{file}:{1 + next(i for i, line in enumerate(lines) if code in line)}"


@pytest.mark.parametrize(
    ("good", "bad", "function", "error", "code"),
    [
        (
            "Linear(8, 1)",
            "Linear(9, 1)",
            "forward",
            "RuntimeError('mat1 and mat2 shapes cannot be multiplied (4x8 and 9x1)')",
            "self.line(inputs)",
        ),
        (
            "torch.full((8,), float(index))",
            'open("absent.png")',
            "read",
            "FileNotFoundError(2, 'No such file or directory')",
            "absent.png",
        ),
    ],
    ids=["model", "data"],
)
def test_an_error_in_one_s_own_model_or_data_names_plugin_function_and_line(
    call: Call, file: Path, good: str, bad: str, function: str, error: str, code: str
) -> None:
    file.write_text(file.read_text().replace(good, bad))
    done = call("train", "mine.toml")
    assert done.returncode == 7
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        f"error: plugin 'mine' ({file}) failed in {function}: {error}, at {place(file, code)}"
    )


def test_an_error_in_a_loader_s_worker_shows_what_the_worker_did(call: Call, file: Path) -> None:
    text = MINE.replace("WORKERS", "1").replace("float(index)", "float(index) / (index - 1)")
    file.write_text(text)
    done = call("train", "mine.toml")
    assert done.returncode == 7
    first, *_, last = done.stderr[done.stderr.index("error: ") :].splitlines()
    assert first == (
        f"error: plugin 'mine' ({file}) failed in batches: ZeroDivisionError, at "
        f"{place(file, 'for inputs in')}:"
    )
    line = place(file, "(index - 1)").rpartition(":")[2]
    assert f'"{file}", line {line}, in read' in done.stderr
    assert last == "ZeroDivisionError: float division by zero"
    assert "launch.py" not in done.stderr


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    return done.stderr


@pytest.mark.parametrize(
    ("first", "said"),
    [
        ("import absent", "{file}:1: ModuleNotFoundError: No module named 'absent'"),
        ("import near", "{folder}/near.py:2: ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError: invalid syntax (mine.py, line 1)"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_the_line(
    call: Call, file: Path, first: str, said: str
) -> None:
    (file.parent / "near.py").write_text("\n1 / 0\n")
    file.write_text(first + "\n" + file.read_text())
    assert error_of(call("train", "mine.toml")) == (
        f"error: mine.toml:1: plugins: mine ({file}) cannot be loaded: "
        f"{said.format(file=file, folder=file.parent)}\n"
    )


def test_a_missing_device_is_named_with_its_place_and_those_that_are_there(
    call: Call, file: Path
) -> None:
    missing = "mps" if sys.platform != "darwin" else "cuda"
    settings = file.with_name("mine.toml")
    settings.write_text(SETTINGS.replace("cpu", missing))
    said = error_of(call("train", "mine.toml"))
    assert said.startswith(f"error: mine.toml:4: run.device: there is no {missing!r} device here")
    assert "(known: auto, " in said
    assert said.endswith("cpu)\n")
    settings.write_text(SETTINGS)
    said = error_of(call("train", "mine.toml", "--set", f"run.device={missing}"))
    assert said.startswith("error: --set: run.device: ")


def test_a_broken_distribution_is_named_where_it_is_asked_for_and_hides_no_other(
    call: Call, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = file.parent / "site/broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fundamentallm]\nbroken = broken:Broken\n"
        "[fundamentallm.commands]\nbreaks = broken:breaks\n"
    )
    (file.parent / "site/broken.py").write_text("import absent\n")
    monkeypatch.setenv("PYTHONPATH", str(file.parent / "site"))
    why = "(broken 1.0) cannot be loaded: ModuleNotFoundError: No module named 'absent'\n"
    assert error_of(call("breaks")).endswith(f"Error: the command 'breaks' {why}")
    said = error_of(call("init", "first.toml", "--plugins", "broken"))
    assert said == f"error: settings: plugins: broken {why}"
    said = error_of(call("train", "mine.toml", "--plugin", "broken"))
    assert said == f"error: mine.toml:1: plugins: broken {why}"
    made = call("schema")
    assert made.returncode == 0
    assert made.stderr == f"broken: left out, it {why.partition(') ')[2]}"
    assert "grad_clip" in made.stdout
    listed = call("plugins")
    assert listed.returncode == 0
    assert "grad_clip" in listed.stdout
