"""The weights of the model without adapters that computes the same, in a file of their own."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save_file

from fundamentallm import SettingsError, StorageError
from fundamentallm_lora.layer import LoraLinear

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from fundamentallm import Run


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of ``model`` with the adapters merged into the weights they are beside.

    Its names are those of the model without adapters. Raises ``SettingsError`` if it has none.
    """
    state: dict[str, Tensor] = dict(model.state_dict())
    merged: dict[LoraLinear, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoraLinear):
            if module not in merged:
                merged[module] = module.merged()
            prefix = f"{name}." if name else ""
            state[f"{prefix}weight"] = merged[module]
            del state[f"{prefix}lora_a"], state[f"{prefix}lora_b"]
    if not merged:
        raise SettingsError("the run's model has no adapters: it was trained without 'lora'")
    return state


@contextmanager
def averaged_weights(run: Run) -> Iterator[None]:
    """Put the weights that ``run`` is validated with in place of the trained ones for a while.

    Raises ``SettingsError`` if these are the trained ones themselves.
    """
    listed = run.plugins.items()
    if all(getattr(plugin, "evaluation_weights", None) is None for _, plugin in listed):
        known = ", ".join(name for name, _ in listed)
        raise SettingsError(
            f"{run.folder}: there are no averaged weights to merge: no plugin of the run has others"
            f" to evaluate with than the trained ones (listed: {known}); leave out --averaged"
        )
    trained = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    with run.hook.evaluation_weights(run=run):
        if all(weight.equal(trained[name]) for name, weight in run.model.named_parameters()):
            raise SettingsError(
                f"{run.folder}: the averaged weights of this checkpoint are the trained ones: the"
                f" average has not begun, or has just; leave out --averaged"
            )
        yield


def write(state: dict[str, Tensor], path: Path) -> None:
    """Write a state dict so that ``path`` is either the whole file or what it was before.

    A tensor with several names is written once, its further names as JSON under ``aliases`` in the
    metadata, as in a checkpoint. Raises ``StorageError`` if it cannot be written.
    """
    owners: dict[tuple[int, object, object], str] = {}
    tensors, aliases = dict[str, "Tensor"](), dict[str, str]()
    for name, tensor in sorted(state.items()):
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        owner = owners.setdefault(place, name) if tensor.numel() else name
        if owner != name:
            aliases[name] = owner
        else:
            tensors[name] = tensor.detach().cpu().contiguous()
    metadata = {"format": "pt"} | ({"aliases": json.dumps(aliases)} if aliases else {})
    draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        _write(tensors, metadata, draft)
        draft.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        why = getattr(error, "strerror", None) or error
        raise StorageError(f"{path}: cannot be written: {why}") from error


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], draft: Path) -> None:
    draft.touch(exist_ok=False)
    mode = draft.stat().st_mode  # as the umask has it; safetensors would let only its owner read
    save_file(tensors, draft, metadata)
    draft.chmod(mode)
    _sync(draft)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
