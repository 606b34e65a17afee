"""A run's snapshot as the files of one folder, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import torch

from fundamentallm_checkpoint import files, jsontext, tensors, trees
from fundamentallm_checkpoint.manifest import ALL, TooLarge, Unsound

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from torch import Tensor

    from fundamentallm import Run, Snapshot
    from fundamentallm_checkpoint.files import Seal
    from fundamentallm_checkpoint.manifest import Manifest

    Report: TypeAlias = Callable[[int, int], None]

_STATE_LIMIT = 2**25
_MODEL, _OPTIMIZER, _STATE, _EXTRA = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "state.safetensors",
)
_TENSORS = (_MODEL, _OPTIMIZER, _EXTRA)


@attrs.frozen
class Packed:
    """A snapshot as its files will hold it: tensors by file and name, and all else in bytes.

    The tensors may be the live ones. ``buffers``: which weights are none that are trained; an
    infinity in one of them, as in a mask, is nothing wrong.
    """

    parts: dict[str, dict[str, Tensor]]
    state: bytes
    buffers: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """The bytes that all files will take, but for their headers."""
        return len(self.state) + sum(tensors.size(part) for part in self.parts.values())


@attrs.frozen
class Contents:
    """What was written. ``poisoned``: weights and moments that hold NaN or infinity."""

    files: dict[str, Seal]
    poisoned: list[str]


def pack(snapshot: Snapshot, trained: Collection[str] | None = None, kind: str = ALL) -> Packed:
    """Sort a snapshot into files. ``trained`` names the weights that are parameters, by default
    all; of kind ``"model"``, only the weights and the progress are taken.

    Weights and optimizer state have a file each: ``name`` and ``key/name`` of every parameter.
    All else is in ``state.json``, its tensors in ``state.safetensors``. Nothing else of the run is
    asked or changed. Raises ``StorageError`` for what could not be read back.
    """
    rest = dict(snapshot)
    if kind != ALL:
        few = {name: rest[name] for name in ("model", "progress", "settings") if name in rest}
        rest = {"optimizer": {}, "plugins": {}} | few
    weights, rest["model"] = _flatten_model(rest["model"])
    moments, rest["optimizer"] = _flatten_optimizer(rest["optimizer"])
    extra: dict[str, Tensor] = {}
    state = jsontext.dump(trees.split(rest, extra))
    jsontext.check_size(_STATE, state, _STATE_LIMIT)
    parts = {_MODEL: weights}
    parts |= {_OPTIMIZER: moments} if kind == ALL else {}
    parts |= {_EXTRA: extra} if extra else {}
    for part in parts.values():
        tensors.check(part)
    buffers = weights.keys() - (weights.keys() if trained is None else trained)
    return Packed(parts, state, frozenset(buffers))


def size(run: Run, kind: str = ALL) -> int:
    """Return the bytes of a checkpoint of the run as it stands; before the first step, most
    optimizers have yet to make their state."""
    # Not the state dict: where a model is in parts, that is a matter for all processes.
    kept = [*run.model.parameters(), *run.model.buffers()]
    if kind == ALL:
        kept += [
            value
            for state in run.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
    return sum(tensor.nbytes for tensor in kept)


def write(folder: Path, packed: Packed, report: Report | None = None) -> Contents:
    """Write the files of a snapshot, each of them durable. ``report`` hears the bytes of tensors
    written so far, and those of all."""
    total = sum(tensors.size(part) for part in packed.parts.values())
    done = told = 0

    def tell(size: int) -> None:
        nonlocal done, told
        done += size
        if report is not None and (done == total or done - told > total // 100):
            told = done
            report(min(done, total - 1), total)

    seals: dict[str, Seal] = {}
    poisoned: list[str] = []
    for name, part in packed.parts.items():
        written = tensors.write(folder / name, part, tell, packed.buffers)
        seals[name] = written.seal
        # A plugin's own state may well hold an infinity: a best value that nothing has beaten yet.
        poisoned += written.poisoned if name != _EXTRA else []
    seals[_STATE] = files.write(folder / _STATE, packed.state)
    if report is not None and total:  # not before: to make the last file durable takes its time
        report(total, total)
    return Contents(seals, poisoned)


def read(folder: Path, manifest: Manifest) -> Snapshot:
    """Read the snapshot back, on the CPU, and every other file through. Raises ``Unsound`` if one
    byte is not as the manifest says, or the files do not make a snapshot, and ``TooLarge`` if
    there is no memory for it."""
    found: dict[str, dict[str, Tensor]] = {}
    state: Any = None
    for name, seal in manifest.files.items():
        try:
            if name in _TENSORS:
                found[name] = tensors.read(folder / name, seal)
            elif name == _STATE:
                state = _read_state(folder / name, seal)
            else:
                _check(files.measure(folder / name), seal)
        except ValueError as error:
            raise Unsound(f"{name} {error}") from error
        except MemoryError as error:
            raise TooLarge(f"{name} {error}: free some, or go on from a smaller one") from error
        except OSError as error:
            raise Unsound(f"{name} cannot be read: {error.strerror}") from error
    try:
        return _assemble(trees.join(state, found.get(_EXTRA, {})), found)
    except (ValueError, RecursionError) as error:
        raise Unsound(f"{_STATE} is not the state of a run: {error}") from error


def _read_state(path: Path, seal: Seal) -> Any:
    with files.Source(path) as source:
        if source.size > _STATE_LIMIT:
            raise ValueError(f"is larger than {_STATE_LIMIT:,} bytes")
        data = source.take(source.size)
        _check(source.seal(), seal)
    return jsontext.parse(data)


def _check(found: Seal, seal: Seal) -> None:
    if found != seal:
        raise ValueError("was changed after it was written (its sha256 differs)")


def _assemble(snapshot: Any, found: dict[str, dict[str, Tensor]]) -> Snapshot:
    parts = [snapshot.get(key) for key in ("model", "optimizer")] if _is_table(snapshot) else [None]
    if not all(_is_table(part) for part in parts):
        raise ValueError("it has no tables 'model' and 'optimizer'")
    snapshot["model"].update(found[_MODEL])
    for name, tensor in found.get(_OPTIMIZER, {}).items():
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
