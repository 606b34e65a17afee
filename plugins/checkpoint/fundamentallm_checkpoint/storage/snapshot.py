"""A run's snapshot as the files of one checkpoint folder, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import torch

from fundamentallm_checkpoint.storage import durable_files, json_tree, safetensors, strict_json
from fundamentallm_checkpoint.storage.manifest import ALL, NoMemoryError, UnsoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from torch import Tensor

    from fundamentallm import Snapshot
    from fundamentallm_checkpoint.storage.durable_files import FileDigest
    from fundamentallm_checkpoint.storage.manifest import Manifest

    Report: TypeAlias = Callable[[int, int], None]

_STATE_LIMIT = 2**25  # bytes
_MODEL, _OPTIMIZER, _STATE, _STATE_TENSORS = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "state.safetensors",
)
_TENSOR_FILES = (_MODEL, _OPTIMIZER, _STATE_TENSORS)


@attrs.frozen
class PackedSnapshot:
    """A snapshot sorted into files: tensors by file and name, and the bytes of ``state.json``.

    The tensors may be the live ones. ``buffers`` are the names in the model's state dict that are
    no parameters: an infinity in one of them, such as a mask, is no sign of divergence.
    """

    tensors: dict[str, dict[str, Tensor]]
    state: bytes
    buffers: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        """The bytes of all files, without the headers of the tensor files."""
        return len(self.state) + sum(safetensors.size(part) for part in self.tensors.values())


@attrs.frozen
class WrittenSnapshot:
    """The files that were written. ``nonfinite``: weights and moments with NaN or infinity."""

    files: dict[str, FileDigest]
    nonfinite: list[str]


def pack(
    snapshot: Snapshot, parameters: Collection[str] | None = None, contents: str = ALL
) -> PackedSnapshot:
    """Sort a snapshot into files; nothing is copied or written.

    ``parameters`` names the weights that are parameters, by default all of them. With
    ``contents="model"``, only weights and progress are taken. Weights and optimizer state have a
    file each, with the names ``name`` and ``key/name`` of every parameter; the rest goes into
    ``state.json``, its tensors into ``state.safetensors``. Raises ``StorageError`` for what could
    not be read back.
    """
    rest = dict(snapshot)
    if contents != ALL:
        few = {name: rest[name] for name in ("model", "progress", "settings") if name in rest}
        rest = {"optimizer": {}, "plugins": {}} | few
    weights, rest["model"] = _split_model(rest["model"])
    moments, rest["optimizer"] = _split_optimizer(rest["optimizer"])
    others: dict[str, Tensor] = {}
    state = strict_json.dump(json_tree.split(rest, others))
    strict_json.check_size(_STATE, state, _STATE_LIMIT)
    tensors = {_MODEL: weights}
    tensors |= {_OPTIMIZER: moments} if contents == ALL else {}
    tensors |= {_STATE_TENSORS: others} if others else {}
    for part in tensors.values():
        safetensors.check(part)
    buffers = weights.keys() - (weights.keys() if parameters is None else parameters)
    return PackedSnapshot(tensors, state, frozenset(buffers))


def write(folder: Path, packed: PackedSnapshot, report: Report | None = None) -> WrittenSnapshot:
    """Write the files of a snapshot and fsync each.

    ``report`` is called with the bytes of tensors written so far and those of all; the two are
    equal once the last file is durable.
    """
    total = sum(safetensors.size(part) for part in packed.tensors.values())
    done = reported = 0

    def count(size: int) -> None:
        nonlocal done, reported
        done += size
        # At most a hundred calls, however many tensors there are.
        if report is not None and (done == total or done - reported > total // 100):
            reported = done
            report(min(done, total - 1), total)

    files: dict[str, FileDigest] = {}
    nonfinite: list[str] = []
    for name, part in packed.tensors.items():
        written = safetensors.write(folder / name, part, count, packed.buffers)
        files[name] = written.digest
        # A plugin's state may hold an infinity on purpose, such as a best value not yet reached.
        nonfinite += written.nonfinite if name != _STATE_TENSORS else []
    files[_STATE] = durable_files.write(folder / _STATE, packed.state)
    if report is not None and total:
        report(total, total)
    return WrittenSnapshot(files, nonfinite)


def read(folder: Path, manifest: Manifest) -> Snapshot:
    """Read the snapshot into CPU memory, and verify every file that the manifest lists.

    Raises ``UnsoundError`` if one byte differs or the files do not form a snapshot, and
    ``NoMemoryError`` if it does not fit into the free memory.
    """
    found: dict[str, dict[str, Tensor]] = {}
    state: Any = None
    for name, digest in manifest.files.items():
        try:
            if name in _TENSOR_FILES:
                found[name] = safetensors.read(folder / name, digest)
            elif name == _STATE:
                state = _read_state(folder / name, digest)
            else:
                # It is not used here, but a checkpoint is sound only as a whole.
                _compare(durable_files.digest(folder / name), digest)
        except ValueError as error:
            raise UnsoundError(f"{name} {error}") from error
        except MemoryError as error:
            raise NoMemoryError(
                f"{name} {error}: free memory, or resume from a smaller one"
            ) from error
        except OSError as error:
            raise UnsoundError(f"{name} cannot be read: {error.strerror}") from error
    try:
        return _assemble(json_tree.join(state, found.get(_STATE_TENSORS, {})), found)
    except (ValueError, RecursionError) as error:
        raise UnsoundError(f"{_STATE} is not the state of a run: {error}") from error


def _read_state(path: Path, digest: FileDigest) -> Any:
    with durable_files.HashingReader(path) as file:
        if file.size > _STATE_LIMIT:
            raise ValueError(f"is larger than {_STATE_LIMIT:,} bytes")
        data = file.take(file.size)
        # Before it is parsed: a damaged file must be reported as damaged, not as bad JSON.
        _compare(file.digest(), digest)
    return strict_json.parse(data)


def _compare(found: FileDigest, digest: FileDigest) -> None:
    if found != digest:
        raise ValueError("was changed after it was written (its sha256 differs)")


def _assemble(snapshot: Any, found: dict[str, dict[str, Tensor]]) -> Snapshot:
    """Put weights and moments back to their places in the tree."""
    parts = [snapshot.get(key) for key in ("model", "optimizer")] if _is_table(snapshot) else [None]
    if not all(_is_table(part) for part in parts):
        raise ValueError("it has no tables 'model' and 'optimizer'")
    snapshot["model"].update(found[_MODEL])
    for name, tensor in found.get(_OPTIMIZER, {}).items():
        key, _, parameter = name.partition("/")
        snapshot["optimizer"].setdefault(parameter, {})[key] = tensor
    return snapshot  # type: ignore[no-any-return]


def _split_model(model: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Separate tensors from other values that a state dict may hold (``get_extra_state``)."""
    found = {name: value for name, value in model.items() if isinstance(value, torch.Tensor)}
    return found, {name: value for name, value in model.items() if name not in found}


def _split_optimizer(
    optimizer: dict[str, dict[str, Any]],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    found: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for parameter, state in optimizer.items():
        plain = {}
        for key, value in state.items():
            # With a slash in the key, ``key/name`` could not be split again.
            if isinstance(value, torch.Tensor) and "/" not in key:
                found[f"{key}/{parameter}"] = value
            else:
                plain[key] = value
        # A parameter with tensors appears by their names; one without any state only here.
        if plain or not state:
            rest[parameter] = plain
    return found, rest


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)
