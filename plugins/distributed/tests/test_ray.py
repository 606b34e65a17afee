"""Ray Train starts the processes of a run, where it is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SETTINGS = """
plugins = ["./parts.py", "checkpoint", "jsonl", "ddp"]
[run]
length = 4
device = "cpu"
"""
PARTS = """
from fundamentallm import plugin
from fundamentallm.testing import TinyParts

@plugin
class Parts(TinyParts):
    pass
"""


@pytest.mark.slow
def test_ray_train_starts_the_processes_of_a_run(tmp_path: Path) -> None:
    pytest.importorskip("ray.train", reason="needs Ray: pip install 'ray[train]'")
    (tmp_path / "tiny.toml").write_text(SETTINGS)
    (tmp_path / "parts.py").write_text(PARTS)
    words = [sys.executable, ROOT / "settings" / "ray_train.py", "tiny.toml", "run", "2"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["outcome"] == "finished"
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [4]
