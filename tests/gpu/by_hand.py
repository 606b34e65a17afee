"""The loop for one GPU that runs are measured against: GPT-2 as one writes it by hand at its best.

Compiled, in bf16, with the fused AdamW, windows through pinned buffers that are copied while the
device works, and no read of a device value between two rows of metrics. The rest is that of
``tests/benchmarks/handwritten.py``.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

import handwritten
import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from device import Device
    from torch import Tensor, nn

BUFFERS = 3
STEPS = 10_000  # the length of the schedule; no measurement is that long


def batches(path: Path, rows: int, length: int, device: Device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random windows as inputs and targets on the device, without a wait for the copies."""
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)
    random = np.random.default_rng(1)
    buffers = [
        device.pinned(torch.empty(rows, length + 1, dtype=torch.int64)) for _ in range(BUFFERS)
    ]
    copied: list[Any] = [None] * BUFFERS
    turn = 0
    while True:
        turn = (turn + 1) % BUFFERS
        if copied[turn] is not None:
            copied[turn].synchronize()
        buffers[turn].numpy()[:] = windows[random.integers(len(windows), size=rows)]
        both = buffers[turn].to(device.kind, non_blocking=True)
        copied[turn] = device.copied()
        yield both[:, :-1].contiguous(), both[:, 1:].contiguous()


def train(
    model: nn.Module,
    source: Iterator[tuple[Tensor, Tensor]],
    turns: Iterator[int],
    device: Device,
    out: Path,
) -> None:
    """Train ``model`` with one micro-batch in a step; ``turns`` yields the numbers of the steps."""
    handwritten.open_log(out / "train.log")
    parameters = list(model.parameters())
    optimizer = handwritten.make_optimizer(parameters)
    compiled = torch.compile(model, backend=device.backend, mode=device.mode)
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    tokens = 0
    with (out / "metrics.jsonl").open("a") as rows:
        for step in turns:
            inputs, targets = next(source)
            with torch.autocast(device.kind, torch.bfloat16):
                loss = compiled(inputs, targets)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, handwritten.MAX_NORM)
            lr = handwritten.lr_at(step - 1, STEPS)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            norms.append(norm)
            tokens += targets.numel()
            if step % handwritten.LOG_EVERY == 0:
                numbers = torch.stack(losses + norms).tolist()
                row = {
                    "train/loss": fmean(numbers[: len(losses)]),
                    "optim/grad_norm": fmean(numbers[len(losses) :]),
                    "optim/lr": lr,
                    "train/tokens": float(tokens),
                }
                losses.clear()
                norms.clear()
                handwritten.write_row(rows, step, STEPS, row)
