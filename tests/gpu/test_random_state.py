"""Random numbers of every device follow from the seed, and are put back where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu
import pytest
import torch

from fundamentallm.rng import Generators
from fundamentallm.testing import Memory, TinyRun, assert_same_weights

ALL_DEVICES = ["cpu", pytest.param("every GPU", marks=pytest.mark.cuda)]


def draw(which: str) -> list[Any]:
    """Draw from the default generator of each device of a kind."""
    count = torch.cuda.device_count() if which == "every GPU" else 0
    devices = [f"cuda:{index}" for index in range(count)] or ["cpu"]
    return [torch.rand(9, device=device).tolist() for device in devices]


@pytest.mark.parametrize("which", ALL_DEVICES)
def test_a_seed_determines_what_every_device_draws(which: str) -> None:
    generators = Generators("cpu" if which == "cpu" else "cuda")
    generators.seed(5, 3)
    first = draw(which)
    assert draw(which) != first
    generators.seed(5, 3)
    assert draw(which) == first
    generators.seed(5, 4)
    assert draw(which) != first


@pytest.mark.parametrize("which", ALL_DEVICES)
def test_what_draws_aside_leaves_no_trace(which: str) -> None:
    generators = Generators("cpu" if which == "cpu" else "cuda")
    generators.seed(5)
    expected = [draw(which), draw(which)]
    generators.seed(5)
    found = [draw(which)]
    with generators.aside(99):
        aside = draw(which)
    found.append(draw(which))
    assert found == expected
    assert aside not in expected


@pytest.mark.parametrize("device", gpu.DEVICES)
def test_a_resumed_run_drops_the_units_that_the_whole_run_drops(
    tiny_run: TinyRun, tmp_path: Path, device: str
) -> None:
    memory, words = Memory(step=5), {"device": device, "length": 9}
    whole = tiny_run(memory, run_dir=tmp_path / "whole", **words)
    torch.rand(7, device=device)  # of what was drawn in between, nothing matters
    resumed = tiny_run(memory, run_dir=tmp_path / "resumed", **words)
    assert resumed.progress.step == whole.progress.step == 9
    assert_same_weights(resumed, whole)
