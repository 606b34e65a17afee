"""Trials: short runs of somebody's settings in a temporary folder, which leave nothing behind."""

from __future__ import annotations

import contextlib
import math
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm import Composed, Period, hook_methods, hookimpl, plugin, role_of

if TYPE_CHECKING:
    from fundamentallm import Run

OWN = "fundamentallm-tuning"
"""What a trial's own plugin is called beside those of the settings."""
# What makes an update what it is: who has a part in one of these belongs to a trial of steps.
SHAPING = frozenset(
    {
        "build_data",
        "build_tokenizer",
        "build_model",
        "adapt_model",
        "checkpoint_activations",
        "compile_model",
        "distribute_model",
        "build_optimizer",
        "collect_batches",
        "weigh_window",
        "train_microbatch",
        "forward",
        "backward",
        "finish_gradients",
        "edit_gradients",
        "optimizer_step",
    }
)
# Who hears nothing but these makes something ready: random state, weights from elsewhere.
PREPARING = frozenset({"on_run_start", "on_train_start", "on_train_end"})
# Who hears these and no more than these follows a run, and may tell others of it.
TOLD = frozenset({"on_log", "on_validation_end", "on_checkpoint_saved", "on_progress"})
FOLLOWING = PREPARING | TOLD | {"on_rewind"}


def hooks(instance: object) -> set[str]:
    """Return the names of the hooks that a plugin answers, hears or surrounds."""
    return {hook for hook, _, _ in hook_methods(type(instance))}


def answers(instance: object, hook: str) -> bool:
    """Tell whether a plugin answers an exclusive hook, rather than surrounding it."""
    found = hook_methods(type(instance))
    return any(name == hook and not options["wrapper"] for name, options, _ in found)


def answering(composed: Composed, hook: str) -> str | None:
    """Return the name of the plugin that answers an exclusive hook."""
    return next((name for name, one in composed.plugins.items() if answers(one, hook)), None)


def follows(instance: object) -> bool:
    """Tell whether a plugin only follows a run: loggers, bars, whoever publishes what it finds."""
    heard = hooks(instance)
    return role_of(instance) == "observer" or (heard <= FOLLOWING and bool(heard & TOLD))


def shapes_steps(instance: object) -> bool:
    """Tell whether updates would be others without a plugin.

    Schedules do not belong to these, since a trial brings its own; nor does who judges the steps
    of others, since a trial wants to see what goes wrong.
    """
    heard = hooks(instance)
    if role_of(instance) == "observer":
        return False
    if heard & SHAPING:
        return "judge_step" not in heard or bool(heard & {"forward", "backward"})
    return heard <= PREPARING


def reduced(composed: Composed, keep: Callable[[object], bool], own: object) -> Composed:
    """Return the settings with those plugins alone that ``keep`` chooses, and ``own`` besides.

    What composes stays composed: nothing that a kept plugin refers to is missed.
    """
    # The time limit is one for the run, and so is what it would be resumed for.
    composed.run.max_time = None
    kept = {name: one for name, one in composed.plugins.items() if keep(one)}
    brought = composed.brought | {OWN: OWN}
    return Composed(composed.host, composed.own, kept | {OWN: own}, composed.source, brought)


def lean(composed: Composed, steps: int, own: object) -> Composed:
    """Return settings for a trial of some steps: nothing but the updates, no validation."""
    run = composed.run
    run.length = run.log_every = Period(steps)
    run.validate_every, run.validate_first = None, False
    trial = reduced(composed, shapes_steps, own)
    if answering(trial, "validate") is None:
        trial.plugins[f"{OWN}-validation"] = Unvalidated()
    return trial


@plugin
class Unvalidated:
    """Finds nothing to validate: the last step of a trial is no reason to."""

    @hookimpl
    def validate(self) -> dict[str, float]:
        """Return no metrics."""
        return {}


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Enter a temporary folder, which is gone afterwards, also after Ctrl-C or SIGTERM."""
    asks = (signal.SIGINT, signal.SIGTERM)

    def leave(number: int, _: object) -> None:
        for other in asks:  # cleaning up must not be cut short
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    # Explicitly, since a shell's background job inherits SIGINT as ignored.
    main = threading.current_thread() is threading.main_thread()
    before: dict[int, Any] = {number: signal.signal(number, leave) for number in asks if main}
    try:
        with tempfile.TemporaryDirectory(prefix="fundamentallm-") as folder:
            yield Path(folder)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def ended(run: Run) -> Run:
    """Return the run, unless a signal ended it: then leave with the signal's exit code."""
    if run.outcome == "interrupted":
        raise SystemExit(128 + (run.signal or signal.SIGINT))
    return run


def window_loss(run: Run) -> float:
    """Return the mean loss of the step's window; reading it makes the host wait."""
    weights = [batch.weight for batch in run.window]
    losses = [float(loss) for loss in run.losses]
    return math.fsum(map(math.prod, zip(weights, losses, strict=True))) / math.fsum(weights)


def catch_up(device: str) -> None:
    """Wait until the device has done what it was asked to."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def peak_memory(device: str) -> int:
    """Return the most bytes that were in use at once: of a GPU's memory, else of the process."""
    import resource
    import sys

    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
