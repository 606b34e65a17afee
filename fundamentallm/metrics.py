"""What a step leads to when it is due: a validation, and a row of metrics for the loggers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fundamentallm import processes
from fundamentallm.errors import NotFiniteError, PluginError

if TYPE_CHECKING:
    from torch import Tensor

    from fundamentallm.run import Run


def report(run: Run, validates: bool) -> bool:
    """Validate and log as far as it is due; False if a signal left no time for what was due."""
    settings, progress = run.settings, run.progress
    every = settings.validate_every
    # A run that stops early is validated at its last step; a signal leaves no time for that.
    over = settings.length.reached(progress) or (run.ending and run.signal is None)
    validating = validates and (over or (every is not None and every.due(progress)))
    logs = validating or over or settings.log_every.due(progress)
    if run.signal is not None:  # a resumed run begins with what is due here
        return not logs
    validated: dict[str, float] = {}
    if validating:
        validated = validation(run)
        if run.signal is not None:
            return False
        # A plugin may have asked for the end because of this validation.
        asked = run.stop_reason is not None
        if run.world_size > 1:
            asked = run.hook.stop_agreed(run=run, stopping=asked)
        run.ending = run.ending or asked
    if logs or run.ending:
        log_row(run, validated)
    return True


def validation(run: Run) -> dict[str, float]:
    """Validate, and call ``on_validation_end`` unless a signal interrupted the validation."""
    found = run.hook.validate(run=run)
    metrics = run.hook.reduce_metrics(run=run, metrics=found, scope="validation")
    if run.world_size > 1:  # what follows from them must be the same in all processes
        metrics = run.from_first(lambda: metrics)
    if run.signal is None:
        run.hook.on_validation_end(run=run, metrics=metrics)
    return metrics


def measured(run: Run, metrics: dict[str, float]) -> dict[str, float]:
    """Return a validation's metrics with those that plugins measure over whole splits."""
    for split, named in run.take_collected().items():
        collected = {}
        for name in sorted(named):
            everyones = named[name]
            if run.world_size > 1:
                everyones = processes.all_pieces(run, f"{split} {name}", everyones)
            collected[name] = _joined(name, everyones)
        answers: Any = run.hook.measure_split(run=run, split=split, collected=collected)
        run.checks.measures(answers, metrics)
    return metrics


def _joined(name: str, pieces: list[Tensor]) -> Tensor:
    """Join what ``run.collect`` kept under a name, on the CPU."""
    import torch

    shapes = {tuple(piece.shape[1:]) if piece.ndim else None for piece in pieces}
    if len(shapes) > 1 or None in shapes:
        found = ", ".join(sorted({str(list(piece.shape)) for piece in pieces}))
        raise PluginError(
            f"run.collect({name!r}): expected tensors that differ in their first dimension alone, "
            f"got the shapes {found}"
        )
    return torch.cat(pieces).cpu()


def log_row(run: Run, validated: dict[str, float]) -> None:
    """Turn what was logged into numbers, and pass the row to the loggers."""
    means = run.hook.reduce_metrics(run=run, metrics=run.take_logged(), scope="row")
    if run.world_size > 1:
        means = run.from_first(lambda: means)
    means["optim/lr"] = run.progress.lr
    means["train/tokens"] = float(run.progress.tokens)
    metrics = means | validated
    run.history.append({"step": run.progress.step, **metrics})
    del run.history[:-5000]  # a long run must not fill the memory; loggers have all rows
    # Before the error below, so that the loggers have the row that explains it.
    run.hook.on_log(run=run, metrics=metrics, validated=bool(validated))
    # Without an applied step in the period there is no training loss, which is no error.
    for name in ("train/loss", *validated):
        if not math.isfinite(metrics.get(name, 0.0)):
            step = run.progress.step
            text = f"step {step}: {name} is {metrics[name]}: the run has diverged"
            raise processes.in_all(run.rank, NotFiniteError(text))
