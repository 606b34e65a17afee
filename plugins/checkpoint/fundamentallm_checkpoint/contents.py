"""A run's snapshot as the files of one folder, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import torch

from fundamentallm_checkpoint import files, tensors, trees

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from torch import Tensor

    from fundamentallm import Snapshot
    from fundamentallm_checkpoint.files import Seal

    Report: TypeAlias = Callable[[int, int], None]

_STATE_LIMIT = 2**28
_MODEL, _OPTIMIZER, _STATE, _EXTRA = (
    "model.safetensors", "optimizer.safetensors", "state.json", "state.safetensors",
)  # fmt: skip


@attrs.frozen
class Contents:
    """What was written. ``poisoned``: weights and moments that hold NaN or infinity."""

    files: dict[str, Seal]
    poisoned: list[str]


def write(folder: Path, snapshot: Snapshot, report: Report | None = None) -> Contents:
    """Write the files of a snapshot, each of them durable.

    Weights and optimizer state have a file each: ``name`` and ``key/name`` of every parameter.
    All else is in ``state.json``, its tensors in ``state.safetensors``. ``report`` hears the bytes
    of tensors written so far, and those of all. Nothing else of the run is asked or changed, and
    the snapshot may be a copy. Raises ``StorageError`` for what could not be read back.
    """
    rest = dict(snapshot)
    weights, rest["model"] = _flatten_model(rest["model"])
    moments, rest["optimizer"] = _flatten_optimizer(rest["optimizer"])
    extra: dict[str, Tensor] = {}
    state = trees.to_json(trees.split(rest, extra))
    trees.check_size(_STATE, state, _STATE_LIMIT)
    parts = {_MODEL: weights, _OPTIMIZER: moments} | ({_EXTRA: extra} if extra else {})
    total = sum(tensors.size(part) for part in parts.values())
    done = 0
    seals: dict[str, Seal] = {}
    poisoned: list[str] = []
    for name, part in parts.items():
        written = tensors.write(folder / name, part)
        seals[name] = written.seal
        # A plugin's own state may well hold an infinity: a best value that nothing has beaten yet.
        poisoned += written.poisoned if name != _EXTRA else []
        done += tensors.size(part)
        if report is not None:
            report(done, total)
    seals[_STATE] = files.write(folder / _STATE, state)
    return Contents(seals, poisoned)


def read(folder: Path, names: Collection[str]) -> Snapshot:
    """Read the snapshot back from the files ``names``, on the CPU.

    Raises ``ValueError`` if they do not make one.
    """
    state = trees.read_json(folder / _STATE, _STATE_LIMIT)
    extra = tensors.read(folder / _EXTRA) if _EXTRA in names else {}
    try:
        snapshot = trees.join(state, extra)
    except RecursionError as error:
        raise ValueError(f"{_STATE} is nested too deeply") from error
    parts = [snapshot.get(key) for key in ("model", "optimizer")] if _is_table(snapshot) else [None]
    if not all(_is_table(part) for part in parts):
        raise ValueError(f"{_STATE} is not the state of a run")
    snapshot["model"].update(tensors.read(folder / _MODEL))
    for name, tensor in tensors.read(folder / _OPTIMIZER).items():
        key, _, parameter = name.partition("/")
        snapshot["optimizer"].setdefault(parameter, {})[key] = tensor
    return snapshot  # type: ignore[no-any-return]


def _flatten_model(model: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Part tensors from what a module may keep besides (``get_extra_state``)."""
    found = {name: value for name, value in model.items() if isinstance(value, torch.Tensor)}
    return found, {name: value for name, value in model.items() if name not in found}


def _flatten_optimizer(
    optimizer: dict[str, dict[str, Any]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    found: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for parameter, kept in optimizer.items():
        plain = {}
        for key, value in kept.items():
            # A key with a slash could not be told from the parameter's name again.
            if isinstance(value, torch.Tensor) and "/" not in key:
                found[f"{key}/{parameter}"] = value
            else:
                plain[key] = value
        if plain or not kept:
            rest[parameter] = plain
    return found, rest


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)
