# mypy: disable-error-code="truthy-function"
# (a frozen hook without implementations is false; see host/dispatch.py)
"""The loop: the order of events, and nothing else. The contract above it is ``hookspecs``."""

from __future__ import annotations

import logging
import math
import time
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from fundamentallm import processes
from fundamentallm.epochs import end_epochs, start_epoch
from fundamentallm.errors import DataError, FundamentalError, SettingsError
from fundamentallm.metrics import log_row, report, validation

if TYPE_CHECKING:
    from fundamentallm.data import Batch, Rejection
    from fundamentallm.run import Run

log = logging.getLogger("fundamentallm")
WEIGHT = attrgetter("weight")


def train(run: Run) -> None:
    """Train until the run's length, a stop or a signal."""
    splits = run.checks.splits(run.data.validation())
    run.splits = tuple(splits)
    if run.settings.validate_every is not None and not splits:
        raise SettingsError("run.validate_every is set, but the data has no held-out split")
    # If a signal prevented the last validation, the resumed run begins with it.
    run.ending = run.progress.closed and run.settings.length.reached(run.progress)
    if run.ending:
        log.info("nothing to do: the run is at step %d already", run.progress.step)
    run.model.train()
    run.hook.on_train_start(run=run)
    # After the plugins: it seeds the generators, and what a plugin drew must not change the data.
    run.reopen_data()
    if run.settings.validate_first and splits and not run.progress.step:
        log_row(run, validation(run))
    train_steps(run, bool(splits))


def train_steps(run: Run, validates: bool) -> None:
    """Make steps until the end, each with what it leads to."""
    hook, started = run.hook, time.perf_counter()
    if not run.progress.closed:  # a signal ended the run between a step and its validation
        close_step(run, validates)
    while not run.ending:
        if hook.on_epoch_start:
            start_epoch(run)
        try:
            train_step(run, started)
        except Exception as error:
            # Ctrl-C also ends the processes that a loader spawned, and no batch follows.
            if run.signal is None or run.window or isinstance(error, FundamentalError):
                raise
            end_without_step(run, error)
            return
        # The clock of the next step starts here: validations and saves are part of the training
        # time.
        started = time.perf_counter()
        if hook.on_epoch_start or hook.on_epoch_end:
            end_epochs(run, run.progress.before[0])
        # A step that is undone gets no validation, no row and no checkpoint.
        if run.rewind_to is None:
            close_step(run, validates)
        else:
            run.go_back()


def end_without_step(run: Run, error: Exception) -> None:
    """End at the last safe point: the current step has no data, and has changed nothing yet."""
    log.warning("no batch follows after the signal: %r", error)
    run.forget_attempt()
    run.in_step, run.ending = False, True
    if run.hook.on_safe_point:
        run.hook.on_safe_point(run=run)


def train_step(run: Run, started: float) -> None:
    """Attempt one update: window, gradients, judgement, update, settlement."""
    hook, progress = run.hook, run.progress
    run.in_step, run.window, run.losses = True, [], []
    for parameter in run.parameters:
        # Not zeros: the optimizer leaves a parameter without a gradient as it is.
        parameter.grad = None
    # A hook without implementations is false; not to call it keeps a step cheap.
    if hook.on_step_start:
        hook.on_step_start(run=run)
    window = hook.collect_batches(run=run, stream=run.stream)
    train_window(run, window)
    if hook.finish_gradients:
        hook.finish_gradients(run=run)
    # After the last hook that may change the gradients before they are judged.
    run.known_norm = []
    run.rejected = judge(run) if hook.judge_step else []
    applied = not run.rejected
    if applied:
        update(run)
    else:
        run.forget_attempt()
    progress.advance(window, applied, processes.agreed_seconds(run, time.perf_counter() - started))
    run.in_step = False
    if hook.settle_step:
        hook.settle_step(run=run, applied=applied)
    if hook.on_step_end:
        hook.on_step_end(run=run)


def train_window(run: Run, window: list[Batch]) -> None:
    """Add the gradients of a window's mean loss to ``.grad``, each micro-batch by its weight.

    A plugin that trains a window again, in other micro-batches say, calls this, too: it seeds the
    random generators for the step and begins ``run.window`` and ``run.losses``.
    """
    hook = run.hook
    # After the window was collected: what the data source drew must not change the step.
    run.generators.seed(run.step_seed, run.progress.applied)
    try:
        # Of several processes, others may wait for this one in the passes of each micro-batch.
        has_part = WEIGHT if run.world_size == 1 else None
        run.losses, run.window = [], list(filter(has_part, window))
    except AttributeError:
        for batch in window:  # only now, so that a right window costs nothing
            run.checks.batch(batch, run.device, "batches()")
        raise
    if not window:
        raise run.checks.ended(run.progress.microbatches)
    if not run.window:
        step = run.progress.step + 1
        raise DataError(f"step {step}: no micro-batch of the window has a target")
    total, last = hook.weigh_window(run=run, window=run.window), run.window[-1]
    for batch in run.window:
        run.weight = batch.weight
        share = batch.weight / total
        hook.train_microbatch(run=run, batch=batch, share=share, is_last=batch is last)
    run.weight = 1 / run.data_size


def judge(run: Run) -> list[Rejection]:
    """Return the rejections of the step, of all processes."""
    verdicts: Any = run.hook.judge_step(run=run)
    rejected = list(filter(None, verdicts))
    if rejected:
        # Only here, so that an accepted step pays for no check of the answers.
        rejected = run.checks.rejections(verdicts)
    return rejected if run.world_size == 1 else processes.all_rejections(run, rejected)


def update(run: Run) -> None:
    """Log the losses, edit the gradients, set the learning rates and make the update."""
    hook = run.hook
    # Here, and not in the window: the loss of a rejected step must not enter the mean.
    for batch, loss in zip(run.window, run.losses, strict=True):
        run.log_loss(loss, batch.weight)
    if hook.edit_gradients:
        # Of several editors, the later ones need the norm of what the earlier ones left.
        if not run.edits_once:
            run.known_norm = None
        hook.edit_gradients(run=run)
    run.known_norm = None
    groups = run.optimizer.param_groups
    if hook.lr_factor:
        # From the base rates: the factors of successive steps must not multiply.
        factors: Any = hook.lr_factor(run=run)
        factor = math.prod(factors)
        for group, base in zip(groups, run.base_lrs, strict=True):
            group["lr"] = base * factor
    run.progress.lr = groups[0]["lr"]
    hook.optimizer_step(run=run)


def close_step(run: Run, validates: bool) -> None:
    """Settle what a step leads to: validation, log, stop, safe point."""
    hook = run.hook
    asked = run.stop_reason is not None or run.signal is not None
    # A signal may reach the processes of a distributed run in different steps: all must agree.
    stopping = hook.stop_agreed(run=run, stopping=asked)
    run.ending = stopping or run.settings.length.reached(run.progress)
    # Before the safe point, so that a checkpoint has the metrics of its step.
    run.progress.closed = report(run, validates)
    run.ending = run.ending or not run.progress.closed
    if hook.on_safe_point:
        hook.on_safe_point(run=run)
