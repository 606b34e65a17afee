"""A run's snapshot: all that a resumed run needs, taken, read and put back."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from fundamentallm import processes
from fundamentallm.data import Progress
from fundamentallm.errors import SettingsError, StorageError
from fundamentallm.host import get_state, set_state

if TYPE_CHECKING:
    from torch import Tensor

    from fundamentallm.run import Run

Snapshot: TypeAlias = dict[str, Any]


def take(run: Run) -> Snapshot:
    """Return the snapshot of a run at a safe point, with the live tensors (``Run.snapshot``)."""
    names = {id(p): name for name, p in run.model.named_parameters()}
    states = {name: get_state(instance) for name, instance in run.plugins.items()}
    tensors = {
        "model": dict(run.model.state_dict()),
        "optimizer": {names[id(p)]: dict(s) for p, s in run.optimizer.state.items() if s},
        "plugins": {name: kept for name, kept in states.items() if kept},
    }
    logged = {name: [list(e) for e in rows] for name, rows in run.settle_logged().items()}
    if run.world_size > 1:
        logged = processes.all_logged(run, logged)
    return {
        **run.hook.gather(run=run, tree=tensors),
        "optimizer_class": str(type(run.optimizer)),
        "progress": attrs.asdict(run.progress) | {"before": list(run.progress.before)},
        "logged": logged,
    }


def read(run: Run) -> Snapshot | None:
    """Return the snapshot to continue from, or None: the same one in all processes."""
    if run.world_size == 1:
        return run.hook.read_checkpoint(run=run)
    found: list[Snapshot | None] = []

    def step_of_first() -> int | None:
        found.append(run.hook.read_checkpoint(run=run))
        return None if found[0] is None else found[0]["progress"]["step"]

    step = run.from_first(step_of_first)
    if not run.rank or step is None:
        return found[0] if found else None
    # By its step: which one is the newest may look different here a moment later.
    wanted, run.wanted_checkpoint = run.wanted_checkpoint, f"step-{step:08d}"
    snapshot = run.hook.read_checkpoint(run=run)
    run.wanted_checkpoint = wanted
    return snapshot


def restore(run: Run, snapshot: Snapshot, *, weights_only: bool) -> None:
    """Put a snapshot back into a run (``Run.restore``)."""
    run.loaded = snapshot.get("loaded")
    # The parameters themselves, by which ``spread`` may know them.
    state = run.model.state_dict(keep_vars=True) if run.world_size > 1 else {}
    try:
        run.model.load_state_dict(
            {
                name: _spread(run, value, state.get(name))
                for name, value in snapshot["model"].items()
            }
        )
    except RuntimeError as error:
        raise StorageError(f"the checkpoint is one of another model: {error}") from error
    for name in run.plugins.keys() & snapshot["plugins"].keys():
        set_state(run.plugins[name], snapshot["plugins"][name])
    counts = snapshot["progress"] | {"epoch_samples": run.progress.epoch_samples}
    run.progress = Progress(**counts | {"before": tuple(counts["before"])})
    if not weights_only:
        _restore_optimizer(run, snapshot)
        # The entries of all processes: once in the sums of all.
        rows = {} if run.rank else snapshot["logged"]
        logged = {name: [(v, w, s) for v, w, s in entries] for name, entries in rows.items()}
        run.swap_logged(defaultdict(list, logged))


def _restore_optimizer(run: Run, snapshot: Snapshot) -> None:
    parameters = dict(run.model.named_parameters())
    names = {id(p): name for name, p in parameters.items()}
    packed = run.optimizer.state_dict()
    held = [names[id(p)] for group in run.optimizer.param_groups for p in group["params"]]
    kept, kind = snapshot["optimizer"], snapshot["optimizer_class"]
    if kind != str(type(run.optimizer)):
        raise SettingsError(f"the checkpoint's optimizer is {kind}; resume with that one")
    packed["state"] = {
        i: {key: _spread(run, value, parameters[name]) for key, value in kept[name].items()}
        for i, name in enumerate(held)
        if name in kept
    }
    run.optimizer.load_state_dict(packed)


def _spread(run: Run, value: Any, like: Tensor | None) -> Any:
    if run.world_size == 1 or like is None or not hasattr(value, "ndim"):
        return value
    return run.hook.spread(run=run, tensor=value, like=like)
