"""Merge adapters into the weights, and write a model's weights as safetensors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from safetensors.torch import save

from fundamentallm import SettingsError, answering, write_durably
from fundamentallm_lora.layer import LoraLayer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from fundamentallm import Run


def merge_adapters(model: nn.Module) -> int:
    """Merge all adapters of ``model`` in place; return how many there were.

    The layers are plain layers afterwards, with the names of the model without adapters.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.merge()
    return len(layers)


def check_adapters(run: Run) -> None:
    """Raise ``SettingsError`` if the run's model has no adapters."""
    if not any(isinstance(module, LoraLayer) for module in run.model.modules()):
        raise SettingsError(
            f"{run.folder}: the run's model has no adapters: it was trained without 'lora'"
        )


def take_averaged_weights(run: Run) -> None:
    """Replace the trained weights by those that the run is validated with.

    Raises ``SettingsError`` if these are the trained weights themselves.
    """
    if answering(run.plugins, "evaluation_weights") is None:
        listed = ", ".join(run.plugins)
        raise SettingsError(
            f"{run.folder}: there are no averaged weights to merge: every plugin of the run"
            f" evaluates with the trained weights (listed: {listed}); leave out --averaged"
        )
    trained = _copies(run.model)
    with run.hook.evaluation_weights(run=run):
        averaged = _copies(run.model)
    if all(weight.equal(trained[name]) for name, weight in averaged.items()):
        raise SettingsError(
            f"{run.folder}: the averaged weights of this checkpoint are the trained ones: the"
            f" average has not begun, or has just begun; leave out --averaged"
        )
    run.model.load_state_dict(averaged, strict=False)


def write_weights(state: dict[str, Tensor], path: Path) -> None:
    """Write a state dict durably as a safetensors file.

    A tensor with several names is stored once; the metadata ``aliases`` maps its other names to
    that name, as JSON, like in a checkpoint. Raises ``StorageError`` if it cannot be written.
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
    write_durably(path, save(tensors, metadata))


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}
