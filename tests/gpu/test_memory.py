"""Memory of a GPU: what is done when it ends, and how much a run takes more than a loop by hand.

Of most of this the CPU has no counterpart that could fail for the same reason: it has no limit that a
test could set, and its allocator keeps no peak. What ``guard`` does after the error is tested with
errors that a test raises, in plugins/guard/tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch
from torch import Tensor, nn

from fundamentallm import OutOfMemoryError, Run, hookimpl, plugin
from fundamentallm.testing import TinyData, TinyRun, weights
from fundamentallm_gpt.model import GPT
from fundamentallm_gpt.shapes import shape_of
from fundamentallm_guard import Guard

MIB = 2**20
ROWS, ROW = 8, 16 * MIB
"""Rows of a micro-batch, and the bytes of one tensor of activations for each."""
ROOM = 160 * MIB
"""Enough for two rows, with their activations and the gradients of those, and not for eight."""

SHAPE: dict[str, Any] = {"num_layers": 8, "num_heads": 8, "d_model": 512}
LENGTH, BATCH, STEPS = 512, 16, 4


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Limit this process to a little more memory than it has taken already."""
    gpu.forget_memory()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + ROOM) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gpu.forget_memory()


@plugin
class Wide:
    """A model of one number, whose activations take much memory for each row."""

    @hookimpl
    def build_model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(()))

            def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                # The validation after the last step is no matter of this test.
                width = ROW // 4 if self.training else 1
                wide = inputs.mean(1, keepdim=True).expand(-1, width)
                out = torch.tanh(self.scale * wide).mean(1, keepdim=True)
                return nn.functional.mse_loss(out, targets)

        return Net()


@pytest.mark.cuda
def test_a_micro_batch_that_does_not_fit_is_split_and_trains_as_a_whole_one(
    tiny_run: TinyRun, tmp_path: Path, little_memory: None
) -> None:
    guard, words = Guard(oom="split"), {"device": "cuda", "log_every": 1}
    split = tiny_run(guard, TinyData(batch_size=ROWS), Wide(), **words)
    assert guard.halvings >= 1
    assert split.progress.applied == split.progress.step == 4
    torch.cuda.set_per_process_memory_fraction(1.0)
    whole = tiny_run(TinyData(batch_size=ROWS), Wide(), run_dir=tmp_path / "whole", **words)
    torch.testing.assert_close(weights(split), weights(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
def test_a_micro_batch_that_does_not_fit_is_skipped_without_a_trace(
    tiny_run: TinyRun, little_memory: None
) -> None:
    before, guard = torch.cuda.memory_allocated(), Guard(oom="skip", max_skips=4)
    run = tiny_run(guard, TinyData(batch_size=ROWS), Wide(), device="cuda")
    assert (run.progress.step, run.progress.applied, guard.skipped) == (4, 0, 4)
    assert float(run.model.scale) == 1.0
    # What the failed attempts held is free again.
    assert torch.cuda.memory_allocated() - before < ROW


@pytest.mark.cuda
def test_where_nothing_is_done_about_it_the_error_reports_the_memory(
    tiny_run: TinyRun, little_memory: None
) -> None:
    with pytest.raises(OutOfMemoryError, match="(?s)out of memory.*PyTorch CUDA memory summary"):
        tiny_run(Guard(), TinyData(batch_size=ROWS), Wide(), device="cuda")


def by_hand() -> int:
    """Return the peak of the memory that a handwritten loop takes, in bytes."""
    gpu.forget_memory()
    before = torch.cuda.memory_allocated()
    tokens = torch.randint(27, (STEPS, BATCH, LENGTH + 1)).pin_memory()
    model = GPT(shape_of(None, SHAPE), vocab_size=27, context_length=LENGTH, dropout=0.0)
    model.to("cuda").train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    for batch in tokens:
        moved = batch.to("cuda", non_blocking=True)
        loss = model(moved[:, :-1].contiguous(), moved[:, 1:].contiguous())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def by_run(start: TinyRun, folder: Path, *more: str, **tables: Any) -> tuple[int, Run]:
    """Return the peak of the memory that a run takes, in bytes, and the run."""
    gpu.forget_memory()
    before = torch.cuda.memory_allocated()
    settings = {
        "text": gpu.corpus(folder) | {"context_length": LENGTH, "batch_size": BATCH},
        "gpt": SHAPE,
        "accumulate": {"microbatches": 1},
        "checkpoint": {"every": 2},
        "run": {"length": STEPS, "log_every": 2, "device": "cuda"},
        **tables,
    }
    listed = ["text", "gpt", "adamw", "grad_clip", "lr_schedule", "accumulate", "checkpoint"]
    observers = ["throughput", "jsonl", "console", "progress"]
    run_dir = folder / "-".join(["run", *more])
    run = start(*listed, *observers, *more, settings=settings, run_dir=run_dir)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, run


@pytest.mark.cuda(seconds=30)
def test_a_run_takes_at_most_2_percent_more_memory_than_a_handwritten_loop(
    tiny_run: TinyRun, tmp_path: Path, record_property: Any
) -> None:
    by_hand()  # so that both find what libraries keep for themselves
    hand = by_hand()
    run, _ = by_run(tiny_run, tmp_path)
    record_property("peak_memory_ratio", round(run / hand, 4))
    assert run <= 1.02 * hand


@pytest.mark.cuda(seconds=30)
def test_recomputing_activations_takes_less_memory_and_trains_the_same_bits(
    tiny_run: TinyRun, tmp_path: Path, record_property: Any
) -> None:
    plain, one = by_run(tiny_run, tmp_path, "deterministic")
    kept = weights(one)
    del one
    less, other = by_run(tiny_run, tmp_path, "deterministic", "activation_checkpointing")
    record_property("peak_memory_ratio", round(less / plain, 4))
    assert less < 0.7 * plain
    assert all(kept[name].equal(value) for name, value in weights(other).items())


def test_the_activations_of_the_model_here_take_the_memory_that_the_limit_assumes() -> None:
    """The arithmetic of ``Wide``, on the CPU: rows times the bytes of a row."""
    model = Wide().build_model()
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.ones(2, 8), torch.ones(2, 1))
    assert max(saved) == 2 * ROW < ROOM < ROWS * 2 * ROW
