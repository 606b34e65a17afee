"""Local plugin files: they import their neighbours, here and in worker processes."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import forked
import pytest

from fundamentallm import compose, train
from fundamentallm.testing import TinyModel, TinyOptimizer

PLUGIN = '''
from fundamentallm import hookimpl, plugin
from fundamentallm.testing import TinyData
from settings_of_mine import SIZE

@plugin
class Mine:
    """Builds data from what its neighbours say."""
    size: int = SIZE

    @hookimpl
    def build_data(self, run):
        from later import source
        return source(self.size, run.device)
'''
LATER = """
from fundamentallm.testing import TinySamples
def source(size, device):
    assert size == {size}
    return TinySamples(size, device)
"""
SPAWNED = '''
import torch
from fundamentallm import Batch, hookimpl, plugin
from numbers_of_mine import numbers

class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return numbers(index)

class Source:
    epoch_samples, fingerprint = 16, "spawned"
    def batches(self, progress):
        loader = torch.utils.data.DataLoader(
            Samples(), batch_size=4, num_workers=2, multiprocessing_context="spawn",
            generator=torch.Generator(),
        )
        while True:
            for inputs in loader:
                yield Batch((inputs, inputs.sum(1, keepdim=True)), 4, 4, 4)
    def validation(self):
        return {}

@plugin
class Spawned:
    """Reads samples in two worker processes, which are spawned and not forked."""
    @hookimpl
    def build_data(self, run):
        return Source()
'''
PARTS = """
from fundamentallm import hookimpl, plugin
from fundamentallm.testing import TinyModel, TinyOptimizer
@plugin
class Parts:
    "A tiny model and optimizer."
    @hookimpl
    def build_model(self):
        return TinyModel().build_model()
    @hookimpl
    def build_optimizer(self, run):
        return TinyOptimizer().build_optimizer(run)
"""


def project(folder: Path, size: int) -> Path:
    """Write a local plugin with two neighbours, one of which it imports in a hook."""
    folder.mkdir()
    (folder / "mine.py").write_text(PLUGIN)
    (folder / "settings_of_mine.py").write_text(f"SIZE = {size}\n")
    (folder / "later.py").write_text(LATER.format(size=size))
    path = folder / "run.toml"
    path.write_text("plugins = ['./mine.py']\n[run]\nlength = 2\ndevice = 'cpu'\n")
    return path


def composed(path: Path) -> Any:
    return compose(path, plugins=[TinyModel(), TinyOptimizer()])


@pytest.fixture(autouse=True)
def _modules_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_a_local_plugin_imports_its_neighbours_also_in_a_hook(tmp_path: Path) -> None:
    path = project(tmp_path / "a", 2)
    train(composed(path), run_dir=tmp_path / "run")
    train(tmp_path / "run/settings.toml", plugins=[TinyModel(), TinyOptimizer()])


def test_neighbours_of_one_name_in_two_folders_are_distinguished(tmp_path: Path) -> None:
    one, other = composed(project(tmp_path / "a", 2)), composed(project(tmp_path / "b", 4))
    assert (one.plugins["mine"].size, other.plugins["mine"].size) == (2, 4)
    for number, each in enumerate([one, other, composed(tmp_path / "a/run.toml")]):
        train(each, run_dir=tmp_path / f"run{number}")


def test_an_unchanged_file_is_executed_once_and_a_changed_one_again(tmp_path: Path) -> None:
    path = project(tmp_path / "a", 2)
    first, other = composed(path), composed(project(tmp_path / "b", 4))
    again = composed(path)
    assert type(again.plugins["mine"]) is type(first.plugins["mine"])
    assert type(other.plugins["mine"]) is not type(first.plugins["mine"])
    # Pickle, as worker processes use it, refuses an object of a class that another one replaced.
    assert pickle.loads(pickle.dumps(type(first.plugins["mine"]))) is type(again.plugins["mine"])
    file = tmp_path / "a/mine.py"
    before = file.stat()
    file.write_text(file.read_text().replace("size: int = SIZE", "size: int = 9876"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert composed(path).plugins["mine"].size == 9876


def test_no_neighbour_hides_an_installed_module(tmp_path: Path) -> None:
    path = project(tmp_path / "a", 2)
    (tmp_path / "a/colorsys.py").write_text("raise RuntimeError('not this one')\n")
    (tmp_path / "a/later.py").write_text("import colorsys\n" + LATER.format(size=2))
    sys.modules.pop("colorsys", None)
    train(composed(path), run_dir=tmp_path / "run")


def test_spawned_workers_find_a_local_plugin_s_classes_and_neighbours(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "spawned.py").write_text(SPAWNED)
    (folder / "parts.py").write_text(PARTS)
    (folder / "numbers_of_mine.py").write_text(
        "import torch\ndef numbers(index):\n    return torch.full((8,), float(index))\n"
    )
    (folder / "run.toml").write_text(
        "plugins = ['./spawned.py', './parts.py']\n[run]\nlength = 3\ndevice = 'cpu'\n"
    )
    words = ["-m", "fundamentallm", "train", folder / "run.toml", "--run-dir", tmp_path / "run"]
    done = forked.run(
        [sys.executable, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "finished after 3 steps" in done.stdout
