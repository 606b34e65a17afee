"""What someone sees whose own files are wrong: where, what came, what to do, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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
        return subprocess.run(
            [sys.executable, "-m", "fundamentallm", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=240,
        )

    return call


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    return done.stderr


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
