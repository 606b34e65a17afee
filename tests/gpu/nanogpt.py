"""GPT-2 trained in the way that nanoGPT's published recipe describes, written from its description.

https://github.com/karpathy/nanoGPT: a vocabulary padded to 50,304, no biases, no dropout, attention
by ``scaled_dot_product_attention``, tied embeddings; micro-batches of 12 windows, 40 of them in a
step; bf16 by autocast, ``torch.compile``, the fused AdamW, clipping at 1.0; batches drawn from a
memory map that is opened every time, through pinned memory, the next one while the forward pass is
queued; a disabled loss scaler in the loop; the loss read every ten steps. No code is from there.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from device import Device

LR, MIN_LR, WARMUP, BETAS, DECAY, LOG_EVERY = 6e-4, 6e-5, 2000, (0.9, 0.95), 0.1, 10


class Norm(nn.Module):
    """A layer norm without bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(Norm(width) for _ in range(2))
        self.three = nn.Linear(width, 3 * width, bias=False)
        self.joined = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        parts = self.three(self.norms[0](x)).split(width, dim=2)
        q, k, v = (part.view(rows, length, self.heads, -1).transpose(1, 2) for part in parts)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.joined(seen.transpose(1, 2).contiguous().view(rows, length, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Model(nn.Module):
    """The model; ``forward`` returns logits and loss, as published."""

    def __init__(self, layers: int, heads: int, width: int, rows: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(rows, width)
        self.places = nn.Embedding(context, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = Norm(width)
        self.output = nn.Linear(width, rows, bias=False)
        self.tokens.weight = self.output.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(inputs.shape[1], dtype=torch.long, device=inputs.device)
        x = self.tokens(inputs) + self.places(place)
        for layer in self.layers:
            x = layer(x)
        logits = self.output(self.norm(x))
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)
        return logits, loss


def batches(path: Path, rows: int, length: int, device: Device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random windows as inputs and targets on the device."""
    while True:
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - length, (rows,))
        inputs, targets = (
            torch.stack(
                [torch.from_numpy(tokens[i + k : i + k + length].astype(np.int64)) for i in starts]
            )
            for k in (0, 1)
        )
        yield tuple(device.pinned(t).to(device.kind, non_blocking=True) for t in (inputs, targets))


def lr_at(step: int) -> float:
    """Return the learning rate of a step: a warmup, then a cosine over 600,000 steps."""
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    done = (step - WARMUP) / (600_000 - WARMUP)
    return MIN_LR + 0.5 * (1 + math.cos(math.pi * done)) * (LR - MIN_LR)


def train(
    model: Model,
    source: Iterator[tuple[Tensor, Tensor]],
    window: int,
    device: Device,
    turns: Iterator[int],
) -> None:
    """Train ``model`` with ``window`` micro-batches in a step; ``turns`` yields the step numbers."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    scaler = torch.amp.GradScaler(device.kind, enabled=False)
    context = torch.amp.autocast(device_type=device.kind, dtype=torch.bfloat16)
    compiled = torch.compile(model, backend=device.backend)
    inputs, targets = next(source)
    started = time.time()
    for step in turns:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        for _ in range(window):
            with context:
                _, loss = compiled(inputs, targets)
                loss = loss / window
            inputs, targets = next(source)
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        now = time.time()
        if step % LOG_EVERY == 0:
            print(f"step {step}: loss {loss.item() * window:.4f}, {1e3 * (now - started):.1f} ms")
        started = now
