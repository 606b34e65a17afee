"""A run that is killed at any moment and resumed ends with the bits of one that never was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

SETTINGS = Path(__file__).parent.parent / "settings"

# Dropout, accumulation, best checkpoints and a schedule are on; saves come often.
SMALL = {
    "run.length": 60,
    "run.validate_every": 15,
    "run.log_every": 7,
    "run.device": "cpu",
    "text.max_bytes": 60_000,
    "text.context_length": 16,
    "text.batch_size": 3,
    "text.validation_batches": 2,
    "gpt.num_layers": 1,
    "gpt.d_model": 16,
    "gpt.dropout": 0.2,
    "accumulate.microbatches": 2,
    "checkpoint.every": 4,
}


def command(folder: Path, cache: Path, sampling: str) -> list[str]:
    sets = [
        f"{key}={value if isinstance(value, int | float) else json.dumps(value)}"
        for key, value in {**SMALL, "text.sampling": sampling, "text.cache_dir": str(cache)}.items()
    ]
    words = [word for one in sets for word in ("--set", one)]
    words += ["--plugin", "accumulate", "--no-plugin", "progress"]
    return [
        sys.executable,
        "-m",
        "fundamentallm",
        "train",
        str(SETTINGS / "tiny.toml"),
        "--run-dir",
        str(folder),
        *words,
    ]


def run_to_end(words: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=240)


def final(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "checkpoints" / "step-00000060" / "model.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in found]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Return the folder of a run that was never killed, by how its data is sampled."""
    made: dict[str, Path] = {}

    def make(sampling: str) -> Path:
        if sampling not in made:
            place = tmp_path_factory.mktemp(sampling)
            done = run_to_end(command(place / "run", place / "cache", sampling))
            assert done.returncode == 0, done.stderr
            made[sampling] = place / "run"
        return made[sampling]

    return make


@pytest.mark.parametrize("sampling", [pytest.param("epochs", marks=pytest.mark.slow), "random"])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(sampling, whole_run, tmp_path):
    whole, killed = whole_run(sampling), tmp_path / "killed"
    moments = random.Random(sampling)
    words = command(killed, tmp_path / "cache", sampling)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(2):
        process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
        reached = wait_for_step(killed, process, moments.randrange(4, 50))
        time.sleep(moments.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        words = [sys.executable, "-m", "fundamentallm", "resume", str(killed)]
        if reached is None:
            break
    done = run_to_end(words)
    assert done.returncode == 0, done.stderr
    assert final(killed) == final(whole)
    assert rows(killed) == rows(whole)


def wait_for_step(folder: Path, process: subprocess.Popen, step: int) -> int | None:
    """Wait until a checkpoint of ``step`` or later is there; None if the run ended before."""
    while process.poll() is None:
        saved = [int(path.name[5:]) for path in folder.glob("checkpoints/step-*")]
        if saved and max(saved) >= step:
            return max(saved)
        time.sleep(0.005)
    return None


def test_a_run_stopped_by_sigterm_loses_no_step_and_says_how_to_go_on(whole_run, tmp_path):
    whole, stopped = whole_run("random"), tmp_path / "stopped"
    words = command(stopped, tmp_path / "cache", "random")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    assert wait_for_step(stopped, process, 12) is not None
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143
    assert f"fundamentallm resume {stopped}" in said
    done = run_to_end([sys.executable, "-m", "fundamentallm", "resume", str(stopped)])
    assert done.returncode == 0, done.stderr
    assert final(stopped) == final(whole)
    assert rows(stopped) == rows(whole)
