"""Trials: short runs of the user's settings in a temporary folder that is deleted afterwards."""

from __future__ import annotations

import contextlib
import math
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fundamentallm import (
    Composed,
    Period,
    Provenance,
    hook_methods,
    hookimpl,
    kind,
    plugin,
    role_of,
    setting_fields,
)

if TYPE_CHECKING:
    from fundamentallm import Run

T = TypeVar("T")
OWN = "fundamentallm-tuning"
"""Instance name of the plugin that a trial adds to those of the settings."""
SHAPING_ROLES = {"data", "model", "optimizer", "training"}
"""What plugins are for that shape an update."""
# A plugin with these hooks alone prepares something: initial weights, determinism.
PREPARING = frozenset({"on_run_start", "on_train_start", "on_train_end"})
# A plugin with these hooks alone follows a run, and may publish its results.
RESULTS = frozenset({"on_log", "on_validation_end", "on_checkpoint_saved", "on_progress"})
FOLLOWING = PREPARING | RESULTS | {"on_rewind"}


def hooks(instance: object) -> set[str]:
    """Return the names of the hooks that a plugin implements or wraps."""
    return {hook for hook, _, _ in hook_methods(type(instance))}


def saves(instance: object) -> bool:
    """Return whether a plugin saves checkpoints."""
    return role_of(instance) == "saver"


def setting(instance: object, name: str, kind: type[T]) -> T | None:
    """Return the value of a plugin's setting; None if its class declares none of this name, or if
    the value is not of this kind."""
    if name not in setting_fields(type(instance)):
        return None
    value = getattr(instance, name)
    return value if isinstance(value, kind) else None


def follows(instance: object) -> bool:
    """Return whether a plugin only follows a run, as loggers and progress bars do."""
    used = hooks(instance)
    return role_of(instance) == "observer" or (used <= FOLLOWING and bool(used & RESULTS))


def shapes_steps(instance: object) -> bool:
    """Return whether a plugin takes part in a trial of updates.

    Schedules do not, because a trial has its own. Plugins that judge steps do not, because a trial
    has to see the faults.
    """
    role, used = role_of(instance), hooks(instance)
    if role not in SHAPING_ROLES or used <= PREPARING:
        return role != "observer" and used <= PREPARING
    if role != "training" or used & {"forward", "backward"}:  # mixed precision judges steps, too
        return True
    # With events alone it changes settings of the run from time to time, as a schedule does.
    return not used & {"lr_factor", "judge_step"} and any(kind(hook) != "event" for hook in used)


def reduced(composed: Composed, keep: Callable[[object], bool], own: object) -> Composed:
    """Return the settings with the plugins that ``keep`` chooses, and ``own``.

    The settings are not checked again: a kept plugin may refer to one that is left out.
    """
    # The time limit is for the run, not for a trial.
    composed.run.max_time = None
    kept = {name: one for name, one in composed.plugins.items() if keep(one)}
    brought = composed.brought | {OWN: Provenance("distribution", OWN)}
    return Composed(composed.host, composed.own, kept | {OWN: own}, composed.source, brought)


def lean(composed: Composed, steps: int, own: object) -> Composed:
    """Return settings for a trial of some steps: updates only, no validation."""
    run = composed.run
    run.length = run.log_every = Period(steps)
    run.validate_every, run.validate_first = None, False
    trial = reduced(composed, shapes_steps, own)
    trial.plugins[f"{OWN}-validation"] = WithoutValidation()
    return trial


@plugin
class WithoutValidation:
    """Leave out the validation that follows the last step of a run."""

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Replace the validation, its wrappers and the event after it by calls without effect."""
        run.hook = run.bind(_without_validation)


def _without_validation(_: str, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
    if hook == "validate":
        return lambda **_: {}
    return (lambda **_: None) if hook == "on_validation_end" else call


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Make a temporary folder; delete it at the end, also after Ctrl-C or SIGTERM."""
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
    """Return the run; if a signal ended it, raise ``SystemExit`` with the signal's exit code."""
    if run.outcome == "interrupted":
        raise SystemExit(128 + (run.signal or signal.SIGINT))
    return run


def window_loss(run: Run) -> float:
    """Return the mean loss of the step's window; reads the device."""
    weights = [batch.weight for batch in run.window]
    losses = [float(loss) for loss in run.losses]
    return math.fsum(map(math.prod, zip(weights, losses, strict=True))) / math.fsum(weights)


def catch_up(device: str) -> None:
    """Wait until the device has finished all queued work."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def peak_memory(device: str) -> int:
    """Return the peak memory in bytes: that of a GPU, else that of the process."""
    import resource
    import sys

    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
