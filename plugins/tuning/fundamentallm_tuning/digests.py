"""Digests of snapshots and batches, to compare them bit by bit without keeping them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from fundamentallm import Batch, Run, Snapshot


def digests(snapshot: Snapshot) -> dict[str, str]:
    """Return a digest for every tensor and every other value of a snapshot, by its path."""
    return dict(_leaves(snapshot, ""))


def batch_digests(batch: Batch | None) -> dict[str, str] | None:
    """Return the digests of a micro-batch; None if there is no batch."""
    return None if batch is None else dict(_leaves(batch.data, ""))


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return the paths whose digests differ."""
    return sorted(
        path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
    )


def restored_from_memory(run: Run) -> list[str]:
    """Set the weights to zero, restore a copy of the snapshot; return the paths that differ.

    For runs without a checkpoint to resume from.
    """
    import torch

    snapshot = run.snapshot()
    kept, before = _copied(snapshot), digests(snapshot)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()
    run.restore(kept)
    return differences(before, digests(run.snapshot()))


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, str]]:
    import torch

    if isinstance(tree, torch.Tensor):
        yield path, _of_tensor(tree)
    elif isinstance(tree, dict):
        for name, branch in tree.items():
            yield from _leaves(branch, f"{path}.{name}" if path else str(name))
    elif isinstance(tree, list | tuple):
        for number, branch in enumerate(tree):
            yield from _leaves(branch, f"{path}[{number}]")
    else:
        yield path, json.dumps(tree, default=repr)


def _of_tensor(tensor: Tensor) -> str:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content: Any = flat.view(torch.uint8).numpy()
    found = hashlib.sha256(content)
    return f"{tensor.dtype} {list(tensor.shape)} {found.hexdigest()}"


def _copied(tree: Any) -> Any:
    """Return a copy on the CPU, where checkpoints are read to."""
    import torch

    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {name: _copied(branch) for name, branch in tree.items()}
    return type(tree)(map(_copied, tree)) if isinstance(tree, list | tuple) else tree
