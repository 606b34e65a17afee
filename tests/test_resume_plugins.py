"""Which plugins a run may be resumed with, decided by what they do to weights and data."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import forked
import pytest

from fundamentallm import SettingsError, recorded, train

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = """
plugins = ["text", "gpt", "adamw", "grad_clip", "checkpoint"]
run = {length = 2, validate_every = 2, log_every = 1, device = "cpu"}
grad_clip = {max_norm = 0.01}
checkpoint = {every = 2}
gpt = {num_layers = 1, num_heads = 2, d_model = 16}

[text]
path = "corpus.txt"
tokenizer = "char"
context_length = 8
batch_size = 2
validation_batches = 2
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, saved at its end."""
    place = tmp_path_factory.mktemp("resumed")
    (place / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    (place / "it.toml").write_text(SETTINGS)
    return train(place / "it.toml", run_dir=place / "run").folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "name",
    [
        "sample",
        "ema",
        "throughput",
        "guard",
        "validation",
        "jsonl",
        "console",
        "progress",
        "early_stopping",
        "activation_checkpointing",
    ],
)
def test_a_plugin_that_changes_nothing_that_was_trained_may_be_added(name: str, run: Path) -> None:
    resumed = train(recorded(run, ["run.length=4"], add=[name]), run_dir=run)
    assert (resumed.outcome, resumed.progress.step) == ("finished", 4)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"remove": ["grad_clip"]}, "grad_clip: listed → not listed"),
        (
            {"add": ["accumulate"], "overrides": ["accumulate.microbatches=2"]},
            "accumulate: not listed → listed",
        ),
        ({"add": ["lr_schedule"]}, "lr_schedule: not listed → listed"),
        ({"overrides": ["grad_clip.max_norm=5.0"]}, "grad_clip.max_norm: 0.01 → 5.0"),
        ({"overrides": ["adamw.lr=0.5"]}, "adamw.lr: 0.001 → 0.5"),
    ],
)
def test_a_change_of_how_weights_are_updated_is_refused(
    choice: dict[str, list[str]], said: str, run: Path
) -> None:
    overrides = ["run.length=4", *choice.get("overrides", [])]
    kept = {key: names for key, names in choice.items() if key != "overrides"}
    with pytest.raises(SettingsError) as caught:
        train(recorded(run, overrides, **kept), run_dir=run)
    assert caught.value.problems[0].partition(": ")[0] == said.partition(": ")[0]
    assert caught.value.problems[0].rpartition("→")[2] == said.rpartition("→")[2]
    assert "checkpoint.allow_changes" in caught.value.problems[-1]


def test_a_wider_model_is_refused_without_advice_that_can_only_fail(run: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        train(recorded(run, ["run.length=4", "gpt.d_model=32"]), run_dir=run)
    assert caught.value.problems[0] == "gpt.d_model: 16 → 32"
    assert "do not fit the model" in caught.value.problems[-1]
    assert "allow_changes" not in str(caught.value)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "fundamentallm", *words]
    return forked.run(whole, capture_output=True, text=True, check=False)


def test_the_command_that_a_refusal_advises_resumes_the_run(run: Path) -> None:
    words = ["resume", str(run), "--no-plugin", "grad_clip", "--set", "run.length=3"]
    refused = command(*words)
    assert refused.returncode == 2, refused.stderr
    assert "grad_clip: listed → not listed" in refused.stderr
    advised = shlex.split(refused.stderr.partition("To resume all the same: ")[2].splitlines()[0])
    resumed = command(*words, *advised)
    assert resumed.returncode == 0, resumed.stderr
    assert "finished after 3 steps" in resumed.stdout
