"""Processes on NVIDIA GPUs, which NCCL connects. ``test_ddp.py`` has the same with gloo."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import ranks
from safetensors.torch import load_file

SETTINGS = """
plugins = ["./parts.py", "grad_clip", "checkpoint", {more}]
[run]
length = 12
device = "cuda"
[parts]
dropout = 0.0
"""
PARTS = """
import torch
from fundamentallm import hookimpl, plugin
from fundamentallm.testing import TinyModel, TinyParts

@plugin
class Parts(TinyParts):
    dropout: float = 0.0

    @hookimpl
    def build_model(self):
        return TinyModel(dropout=self.dropout).build_model()
"""


def trained(folder: Path, plugins: str, count: int) -> dict[str, Any]:
    (folder / "parts.py").write_text(PARTS)
    (folder / "tiny.toml").write_text(SETTINGS.format(more=plugins))
    name = f"run-{plugins.count(',')}-{'fsdp' in plugins}-{count}"
    words = ["train", "tiny.toml", "--run-dir", name]
    ended = (
        ranks.run(words, folder, count) if count else ranks.wait([ranks.start_alone(words, folder)])
    )
    assert {one.code for one in ended} == {0}, ended
    return load_file(folder / name / "checkpoints" / "step-00000012" / "model.safetensors")


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.cuda(60)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_with_nccl_ends_as_without(tmp_path: Path, kind: str) -> None:
    alone = trained(tmp_path, '"jsonl"', 0)
    one = trained(tmp_path, f'"jsonl", "{kind}"', 1)
    assert furthest(alone, one) == 0.0


@pytest.mark.cuda(90)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_gpus_end_with_the_weights_of_one(tmp_path: Path, kind: str) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    alone = trained(tmp_path, '"jsonl"', 0)
    assert furthest(alone, trained(tmp_path, f'"jsonl", "{kind}"', 2)) < 1e-6


@pytest.mark.cuda(60)
def test_a_killed_process_ends_the_other_with_nccl(tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "tiny.toml").write_text(SETTINGS.format(more='"ddp"').replace("12", "1000000"))
    first, second = ranks.start(["train", "tiny.toml", "--run-dir", "run"], tmp_path)
    while not list((tmp_path / "run").glob("settings.toml")):
        assert first.poll() is None
    os.kill(second.pid, 9)
    assert ranks.wait([first])[0].code == 8
