"""Every recipe of docs/recipes.md works as it is printed: its files are written, its commands run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch

from fundamentallm import load_run, train

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
RECIPES = {section.partition("\n")[0]: section for section in SECTIONS}


def run(line: str, folder: Path) -> str:
    """Run a printed command with the Python of the tests; ``pip install`` goes to a folder."""
    words, start = shlex.split(line), subprocess.run
    if words[:2] == ["pip", "install"]:
        options = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "--target", "installed"]
        words = [sys.executable, "-m", *words[:2], *options, *words[2:]]
    elif words[0] == "fundamentallm":
        words, start = [sys.executable, "-m", *words], forked.run
    known = {**os.environ, "PYTHONPATH": str(folder / "installed"), "OMP_NUM_THREADS": "1"}
    done = start(words, cwd=folder, capture_output=True, text=True, env=known)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def generator_has_learned_the_mean(folder: Path) -> None:
    row = (folder / "runs" / "gan" / "metrics.jsonl").read_text().splitlines()[-1]
    (mean,) = re.findall(r'"train/mean": ([-\d.]+)', row)
    assert abs(float(mean) - 3) < 0.5


def resumed_run_equals_one_that_never_stopped(folder: Path) -> None:
    run('fundamentallm train loader.toml --run-dir runs/whole --set run.length="4 epochs"', folder)
    last = "checkpoints/step-00000080/model.safetensors"
    resumed, whole = ((folder / "runs" / name / last) for name in ("loader", "whole"))
    assert resumed.read_bytes() == whole.read_bytes()


def f1_is_that_of_the_whole_split(folder: Path) -> None:
    lines = (folder / "runs" / "f1" / "metrics.jsonl").read_text().splitlines()
    rows = {row["step"]: row["metrics"] for row in map(json.loads, lines)}
    logged = {step: row["val/f1"] for step, row in rows.items() if "val/f1" in row}
    assert logged.keys() == {50, 100}
    kept = load_run(folder / "runs" / "f1")
    batches = kept.data.validation()["val"]
    assert kept.progress.step in logged
    with torch.no_grad():
        predicted = torch.cat([kept.model(batch.data[0]) > 0 for batch in batches])
    positive = torch.cat([batch.data[1] > 0 for batch in batches])
    right, wrong = (predicted & positive).sum(), (predicted ^ positive).sum()
    direct = float(2 * right / (2 * right + wrong))
    assert 0 < direct < 1
    assert logged[kept.progress.step] == pytest.approx(direct)


def resumed_optimizers_equal_those_that_never_stopped(folder: Path) -> None:
    settings = folder / "two_optimizers.toml"
    whole, resumed = (folder / "runs" / name for name in ("whole", "resumed"))
    train(settings, overrides=["run.length=30", "checkpoint.every=20"], run_dir=whole)
    shutil.copytree(whole, resumed)
    # The schedule depends on the length, so the run that is resumed has the same one.
    shutil.rmtree(resumed / "checkpoints" / "step-00000030")
    assert train(resumed / "settings.toml", run_dir=resumed).progress.step == 30
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, other = (at / "checkpoints" / "step-00000030" / file for at in (whole, resumed))
        assert one.read_bytes() == other.read_bytes()


CHECKS = {
    "Your own module and a DataLoader with workers": resumed_run_equals_one_that_never_stopped,
    "A metric over a whole split": f1_is_that_of_the_whole_split,
    "Two optimizer classes": resumed_optimizers_equal_those_that_never_stopped,
    "A GAN with alternating steps": generator_has_learned_the_mean,
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_works_as_it_is_printed(name, tmp_path):
    section = RECIPES[name]
    files = re.findall(r"^```\w+ (\S+)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    for file, text in files:
        (tmp_path / file).write_text(text)
    commands = re.findall(r"^\$ (.*)$", section, re.MULTILINE)
    assert files
    assert commands
    output = [run(line, tmp_path) for line in commands]
    assert any("finished after" in text for text in output)
    if name in CHECKS:
        CHECKS[name](tmp_path)


def test_every_check_belongs_to_a_recipe():
    assert CHECKS.keys() <= RECIPES.keys()
