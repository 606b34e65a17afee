"""What the compiler makes for a GPU trains the same weights; plugins/compile/tests has the CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch

from fundamentallm import Run
from fundamentallm.testing import TinyRun, weights

STEPS = 6
WAYS = {
    "model": {"compile": {}},
    "blocks": {"compile": {"scope": "blocks"}},
    "graphs": {"compile": {"mode": "reduce-overhead"}},
    "blocks, recomputed": {"compile": {"scope": "blocks"}, "activation_checkpointing": {}},
}


@pytest.fixture(autouse=True)
def reset_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def trained(start: TinyRun, folder: Path, name: str, more: dict[str, Any], **amp: str) -> Run:
    settings = {
        "text": gpu.corpus(folder) | {"context_length": 64, "batch_size": 4},
        "gpt": {"num_layers": 3, "num_heads": 4, "d_model": 64},
        "accumulate": {"microbatches": 2},
        "run": {"length": STEPS, "log_every": 1, "validate_every": STEPS, "device": "cuda"},
        **({"amp": amp} if amp else {}),
        **more,
    }
    listed = ["adamw", "grad_clip", "lr_schedule", *(name for name in settings if name != "run")]
    return start(*listed, settings=settings, run_dir=folder / name)


@pytest.mark.cuda(seconds=60)
@pytest.mark.parametrize("way", WAYS)
def test_compiled_code_for_a_gpu_trains_what_the_plain_code_trains(
    tiny_run: TinyRun, tmp_path: Path, way: str
) -> None:
    plain = trained(tiny_run, tmp_path, "plain", {})
    compiled = trained(tiny_run, tmp_path, "compiled", WAYS[way])
    for mine, expected in zip(compiled.history, plain.history, strict=True):
        assert mine["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-3)
    assert compiled.history[-1]["val/loss"] == pytest.approx(
        plain.history[-1]["val/loss"], rel=1e-3
    )
    assert weights(compiled).keys() == weights(plain).keys()


@pytest.mark.cuda(seconds=60)
@pytest.mark.parametrize("way", ["model", "graphs"])
def test_compiled_code_in_bf16_has_nearly_the_losses_of_the_plain_code(
    tiny_run: TinyRun, tmp_path: Path, way: str
) -> None:
    plain = trained(tiny_run, tmp_path, "plain", {}, dtype="bf16")
    compiled = trained(tiny_run, tmp_path, "compiled", WAYS[way], dtype="bf16")
    for mine, expected in zip(compiled.history, plain.history, strict=True):
        assert mine["train/loss"] == pytest.approx(expected["train/loss"], rel=2e-2)
