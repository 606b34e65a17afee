# mypy: disable-error-code="truthy-function"
# (a frozen hook that nobody hears is false; see dispatch)
"""The loop: the order of events, and nothing else. The contract above it is ``hookspecs``."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any

from fundamentallm.errors import DataError, NotFiniteError, SettingsError
from fundamentallm.states import seed_random

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fundamentallm.run import Batch, Run

log = logging.getLogger("fundamentallm")


def build(run: Run) -> None:
    """Build what the run trains: data, tokenizer, model, optimizer, in this order."""
    hook = run.hook
    run.data = hook.build_data(run=run)
    run.progress.epoch_samples = run.data.epoch_samples
    run.tokenizer = hook.build_tokenizer(run=run)
    seed_random(run.seed_for("model"))
    run.model = hook.build_model(run=run).to(run.device)
    hook.adapt_model(run=run)
    module = hook.checkpoint_activations(run=run, model=run.model)
    module = hook.compile_model(run=run, model=module)
    run.module = hook.distribute_model(run=run, model=module)
    run.parameters = list(run.model.parameters())
    run.optimizer = hook.build_optimizer(run=run)
    run.base_lrs = [group["lr"] for group in run.optimizer.param_groups]
    seed_random(run.seed_for("train"))


def train(run: Run, started: float) -> None:
    """Train until the run's length, a stop or a signal. ``started``: ``perf_counter()`` then."""
    hook = run.hook
    splits = run.data.validation()
    if run.settings.validate_every is not None and not splits:
        raise SettingsError("run.validate_every is set, but the data has no held-out split")
    run.ending = run.settings.length.reached(run.progress)
    if run.ending:
        log.info("nothing to do: the run is at step %d already", run.progress.step)
    run.model.train()
    hook.on_train_start(run=run)
    stream = iter(run.data.batches(run.progress))
    while not run.ending:
        train_step(run, stream, started)
        started = time.perf_counter()
        close_step(run, bool(splits))


def train_step(run: Run, stream: Iterator[Batch], started: float) -> None:
    """Attempt one update: window, gradients, judgement, update, settlement."""
    hook, progress = run.hook, run.progress
    for parameter in run.parameters:
        parameter.grad = None
    if hook.on_step_start:
        hook.on_step_start(run=run)
    run.window = window = hook.collect_batches(run=run, stream=stream)
    train_window(run, window)
    if hook.finish_gradients:
        hook.finish_gradients(run=run)
    verdicts: Any = hook.judge_step(run=run) if hook.judge_step else ()
    run.rejected = list(filter(None, verdicts))
    applied = not run.rejected
    if applied:
        for batch, loss in zip(window, run.losses, strict=False):
            run.log("train/loss", loss, batch.weight)
        update(run)
    else:
        run.forget_step()
    progress.advance(window, applied, time.perf_counter() - started)
    if hook.settle_step:
        hook.settle_step(run=run, applied=applied)
    if hook.on_step_end:
        hook.on_step_end(run=run)


def train_window(run: Run, window: list[Batch]) -> None:
    """Add up the gradients of a window's mean loss, weighing each micro-batch by what it holds."""
    hook = run.hook
    run.losses = []
    total = hook.weigh_window(run=run, window=window)
    if not total:
        why = "no micro-batch of the window has a target" if window else "the data has ended"
        raise DataError(f"step {run.progress.step + 1}: {why}")
    last = window[-1]
    for batch in window:
        if batch.weight:
            run.weight = batch.weight
            share = batch.weight / total
            hook.train_microbatch(run=run, batch=batch, share=share, is_last=batch is last)
    run.weight = 1.0


def update(run: Run) -> None:
    """Edit the gradients, set the learning rates and make the update."""
    hook = run.hook
    if hook.edit_gradients:
        hook.edit_gradients(run=run)
    if hook.lr_factor:
        factors: Any = hook.lr_factor(run=run)
        factor = math.prod(factors)
        for group, base in zip(run.optimizer.param_groups, run.base_lrs, strict=True):
            group["lr"] = base * factor
    hook.optimizer_step(run=run)


def close_step(run: Run, validates: bool) -> None:
    """Settle what a step leads to: validation, log, stop, safe point."""
    hook, settings, progress = run.hook, run.settings, run.progress
    asked = run.stop_reason is not None or run.signal is not None
    stopping = hook.stop_agreed(run=run, stopping=asked)
    run.ending = stopping or settings.length.reached(progress)
    every = settings.validate_every
    validated: dict[str, float] = {}
    # A signal leaves little time, and a validation that the uninterrupted run would not have made
    # would change what plugins count.
    if validates and not run.signal and (run.ending or (every is not None and every.due(progress))):
        validated = hook.reduce_metrics(run=run, metrics=hook.validate(run=run))
        hook.on_validation_end(run=run, metrics=validated)
        run.ending = run.ending or run.stop_reason is not None
    # Interrupted, the log period goes on where the run is resumed.
    if validated or (run.ending and not run.signal) or settings.log_every.due(progress):
        log_row(run, validated)
    if hook.on_safe_point:
        hook.on_safe_point(run=run)


def log_row(run: Run, validated: dict[str, float]) -> None:
    """Turn what was logged into numbers, and hand the row to the loggers."""
    means = run.hook.reduce_metrics(run=run, metrics=run.take_logged())
    means["optim/lr"] = run.optimizer.param_groups[0]["lr"]
    means["train/tokens"] = float(run.progress.tokens)
    metrics = means | validated
    run.history.append({"step": run.progress.step, **metrics})
    run.hook.on_log(run=run, metrics=metrics)
    for name in ("train/loss", *validated):
        if not math.isfinite(metrics.get(name, 0.0)):
            step = run.progress.step
            raise NotFiniteError(f"step {step}: {name} is {metrics[name]}: the run has diverged")
