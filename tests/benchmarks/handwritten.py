"""The loop that runs are measured against: what one writes by hand for one model, and writes well.

It does the work of a run with a dozen plugins: warmup and cosine, clipping, weight decay on
matrices alone, losses that stay on the device until a row is due, rows in ``metrics.jsonl``, lines
in ``train.log`` and on the terminal, checkpoints in two rhythms, samples. Nothing of it can be
chosen, and so nothing of it costs a call. ``train_fully`` does what the features of a long run add:
bf16, a look at whether the gradients are finite, averaged weights, times of the steps, collection of
garbage at set times, and norms of gradients, weights and updates in the steps that have a row.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import sys
import time
from statistics import fmean
from typing import TYPE_CHECKING, TextIO

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

LR, DECAY_TO, WARMUP = 1e-3, 0.1, 10
BETAS, WEIGHT_DECAY, MAX_NORM = (0.9, 0.99), 0.1, 1.0
LOG_EVERY = 50
NEVER = 10**9
EMA_DECAY, COLLECT_EVERY = 0.999, 1000
SIZES = ("grad_norm/linear", "weight_norm/linear", "update_ratio/linear")
SAVE_EVERY = ARCHIVE_EVERY = SAMPLE_EVERY = POEM_EVERY = NEVER

log = logging.getLogger("handwritten")


def lr_at(step: int, steps: int) -> float:
    """Return the learning rate of the update that follows ``step`` others."""
    if step < WARMUP:
        return LR * ((step + 1) / (WARMUP + 1))
    x = (step - WARMUP) / (steps - WARMUP)
    return LR * (DECAY_TO + (1 - DECAY_TO) * (1 + math.cos(math.pi * x)) / 2)


def make_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return a fused AdamW that decays matrices alone."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=LR, betas=BETAS, fused=True)


def train(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int, folder: Path
) -> list[dict[str, float]]:
    """Train ``model`` for ``steps`` steps and return the rows of metrics."""
    open_log(folder / "train.log")
    model.train()
    parameters = list(model.parameters())
    optimizer = make_optimizer(parameters)
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    history: list[dict[str, float]] = []
    step = tokens = 0
    seconds = 0.0
    with (folder / "metrics.jsonl").open("a") as rows:
        while step < steps:
            started = time.perf_counter()
            inputs, targets = next(batches)
            loss = model(inputs, targets)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            lr = lr_at(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            norms.append(norm)
            step += 1
            tokens += targets.numel()
            seconds += time.perf_counter() - started
            if step % LOG_EVERY == 0 or step == steps:
                numbers = torch.stack(losses + norms).tolist()
                means = fmean(numbers[: len(losses)]), fmean(numbers[len(losses) :])
                losses.clear()
                norms.clear()
                row = {"train/loss": means[0], "optim/grad_norm": means[1], "optim/lr": lr}
                write_row(rows, step, steps, row | {"train/tokens": float(tokens)})
                history.append({"step": step, **row, "train/tokens": float(tokens)})
            if step % SAVE_EVERY == 0 or step % ARCHIVE_EVERY == 0:
                save(model, optimizer, step, folder)
            if step % SAMPLE_EVERY == 0 or step % POEM_EVERY == 0:
                raise AssertionError("no measurement is that long")
    log.info("finished after %.1f s", seconds)
    return history


def train_fully(
    model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], steps: int, folder: Path
) -> list[dict[str, float]]:
    """Train ``model`` with all that a careful user lists; return the rows of metrics."""
    open_log(folder / "train.log")
    model.train()
    parameters = list(model.parameters())
    averages = copied(parameters)
    optimizer = make_optimizer(parameters)
    losses: list[Tensor] = []
    norms: list[Tensor] = []
    times: list[float] = []
    history: list[dict[str, float]] = []
    step = tokens = skipped = 0
    gc.disable()
    with (folder / "metrics.jsonl").open("a") as rows:
        while step < steps:
            started = time.perf_counter()
            inputs, targets = next(batches)
            before = copied(parameters) if (step + 1) % LOG_EVERY == 0 else []
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(inputs, targets)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            lr = lr_at(step, steps)
            # The cheapest look there is, at a number that is there anyway. It also rejects gradients
            # that are finite but so large that their norm overflows.
            if math.isfinite(norm.item()):
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                sizes = measure(parameters, before) if before else []
                torch._foreach_lerp_(averages, parameters, 1 - EMA_DECAY)
                losses.append(loss.detach())
                norms.append(norm)
            else:
                sizes = []
                skipped += 1
            optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens += targets.numel()
            times.append(time.perf_counter() - started)
            if step % COLLECT_EVERY == 0:
                gc.collect(1)
            if step % LOG_EVERY == 0 or step == steps:
                numbers = torch.stack(losses + norms + sizes).tolist()
                last = 2 * len(losses)
                means = fmean(numbers[: len(losses)]), fmean(numbers[len(losses) : last])
                row = {
                    "train/loss": means[0],
                    "optim/grad_norm": means[1],
                    "optim/lr": lr,
                    "train/tokens": float(tokens),
                    "guard/skipped": float(skipped),
                    "perf/step_ms_median": 1e3 * sorted(times)[len(times) // 2],
                }
                row |= zip(SIZES, numbers[last:], strict=False)  # the last row may have none
                for kept in (losses, norms, times):
                    kept.clear()
                write_row(rows, step, steps, row)
                history.append({"step": step, **row})
            if step % SAVE_EVERY == 0 or step % ARCHIVE_EVERY == 0:
                save(model, optimizer, step, folder)
    gc.enable()
    log.info("finished")
    return history


def copied(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return copies of the weights as they are now."""
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def measure(parameters: list[nn.Parameter], before: list[Tensor]) -> list[Tensor]:
    """Return the norms of gradients and weights, and that of the update over that of the weights."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    changes = torch._foreach_sub(parameters, before)
    change, start = (torch.nn.utils.get_total_norm(part) for part in (changes, before))
    weights = torch.nn.utils.get_total_norm(parameters)
    return [torch.nn.utils.get_total_norm(grads), weights, change / start]


def write_row(rows: TextIO, step: int, steps: int, metrics: dict[str, float]) -> None:
    """Write a row of metrics to its file, to the log, and to the terminal."""
    facts = {
        "time": time.time(),
        "step": step,
        "tokens": metrics["train/tokens"],
        "metrics": metrics,
    }
    rows.write(json.dumps(facts) + "\n")
    rows.flush()
    shown = ", ".join(f"{name} {value:,.5g}" for name, value in metrics.items())
    log.info("step %d: %s", step, shown)
    sys.stderr.write(f"{step}/{steps} ({step / steps:.0%})  loss {metrics['train/loss']:.4g}\n")
    sys.stderr.flush()


def open_log(path: Path) -> None:
    """Let the log go to a file of its own, and nowhere else."""
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, folder: Path) -> None:
    """Save what a resumed training needs."""
    kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(kept, folder / f"step-{step:08d}.pt")
