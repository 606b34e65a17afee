"""A run that is killed and resumed on a GPU ends as the run that never was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import gpu
import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from torch import Tensor

LAST, KILLED_AT = 60, 16
SETTINGS: dict[str, Any] = {
    "run": {"length": LAST, "log_every": 7, "validate_every": 20},
    "text": {"context_length": 64, "batch_size": 4},
    "gpt": {"num_layers": 2, "num_heads": 2, "d_model": 32, "dropout": 0.2},
    "accumulate": {"microbatches": 2},
    "amp": {"dtype": "bf16"},
    "ema": {"decay": 0.9},
    "lr_schedule": {"warmup": "5 steps"},
    "checkpoint": {"every": 4},
}
OTHERS = ["adamw", "grad_clip", "guard", "jsonl"]
# Torch is used in this process already, and a child of it could not use the GPU: a new interpreter
# can. On the CPU a forked process saves time.
START = {"cpu": forked, "cuda": subprocess}


def write_settings(folder: Path, device: str, *more: str) -> Path:
    tables = {name: dict(table) for name, table in SETTINGS.items()}
    tables["text"] |= gpu.corpus(folder)
    tables["run"]["device"] = device
    plugins = [*(name for name in tables if name != "run"), *OTHERS, *more]
    path = folder / "settings.toml"
    path.write_text(tomli_w.dumps({"plugins": plugins, **tables}))
    return path


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "fundamentallm", *map(str, words)]


def finish(device: str, *words: str | Path) -> None:
    done = START[device].run(command(*words), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def kill_in_the_middle(device: str, settings: Path, folder: Path) -> int:
    """Start a run, kill it once it has saved a certain step, and return the last step it saved."""
    words = command("train", settings, "--run-dir", folder)
    process = START[device].Popen(words, stderr=subprocess.DEVNULL, env={**os.environ})
    saved = [0]
    while process.poll() is None and max(saved) < KILLED_AT:
        saved = [0, *(int(path.name[5:]) for path in folder.glob("checkpoints/step-*"))]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run has ended before it was killed"
    return max(saved)


def final(folder: Path) -> dict[str, Tensor]:
    """Return all weights, moments and averages of the last checkpoint."""
    last = folder / "checkpoints" / f"step-{LAST:08d}"
    return {
        f"{path.stem}: {name}": tensor
        for path in sorted(last.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def whole_and_killed(device: str, place: Path, *more: str) -> tuple[Path, Path]:
    settings = write_settings(place, device, *more)
    whole, killed = place / "whole", place / "killed"
    finish(device, "train", settings, "--run-dir", whole)
    assert KILLED_AT <= kill_in_the_middle(device, settings, killed) < LAST
    finish(device, "resume", killed)
    return whole, killed


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param("cuda", marks=pytest.mark.cuda(seconds=60)),
    ],
)
def test_with_deterministic_a_killed_run_ends_with_the_same_bits(
    device: str, tmp_path: Path
) -> None:
    whole, killed = map(final, whole_and_killed(device, tmp_path, "deterministic"))
    assert whole.keys() == killed.keys()
    different = [name for name in whole if not whole[name].equal(killed[name])]
    assert different == []


# On the CPU the same run has the same bits in any case.
@pytest.mark.cuda(seconds=60)
def test_without_deterministic_it_ends_with_the_deviation_that_is_recorded(
    tmp_path: Path, record_property: Any
) -> None:
    whole, killed = map(final, whole_and_killed("cuda", tmp_path))
    weights = [name for name in whole if name.startswith("model")]
    away = max(float((whole[name] - killed[name]).abs().max()) for name in weights)
    size = max(float(whole[name].abs().max()) for name in weights)
    record_property("largest_deviation", away)
    assert away <= 0.05 * size
    assert all(bool(torch.isfinite(killed[name]).all()) for name in weights)
