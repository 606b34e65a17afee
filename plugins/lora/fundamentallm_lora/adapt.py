"""Choose the layers that get adapters, and the parameters that are trained."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import nn

from fundamentallm import SettingsError, matches, parameter_names, unmatched
from fundamentallm_lora.layer import add_adapter, can_adapt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fundamentallm import Run
    from fundamentallm_lora import Lora


def adapt(run: Run, settings: Lora, plugin: str) -> list[str]:
    """Add adapters to the targets, freeze the rest, and return the names of the adapted layers.

    ``plugin`` is the instance name that begins errors. Raises ``SettingsError`` if a pattern
    matches nothing, or if a target cannot have an adapter.
    """
    model = run.model
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if can_adapt(module)}
    names = parameter_names(model)
    known = [alias for aliases in names.values() for alias in aliases]
    problems = [
        *_unmatched_layers(f"{plugin}.targets", settings.targets, layers, modules),
        *_unmatched_layers(f"{plugin}.except_for", settings.except_for, layers, modules),
        *unmatched(f"{plugin}.train_also", settings.train_also, known),
    ]
    chosen = {
        name: layer
        for name, layer in layers.items()
        if matches(name, settings.targets) and not matches(name, settings.except_for)
    }
    problems += _unsuitable(model, chosen, plugin)
    if not chosen and not problems:
        problems = [f"{plugin}.except_for: leaves no layer to adapt"]
    if problems:
        raise SettingsError(problems)
    parameters = dict(model.named_parameters())
    for name, aliases in names.items():
        trained = matches(aliases, settings.train_also)
        parameters[name].requires_grad = parameters[name].requires_grad and trained
    for name, layer in chosen.items():
        # One seed per layer: an adapter starts with the same values whichever others there are.
        generator = torch.Generator().manual_seed(run.seed_for(f"lora/{name}"))
        add_adapter(layer, settings, generator)
    return list(chosen)


def _unsuitable(model: nn.Module, chosen: dict[str, nn.Module], plugin: str) -> Iterator[str]:
    """Yield errors for layers whose weight is also used other than by calling the layer."""
    owners = defaultdict[int, list[str]](list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
    fast = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.TransformerEncoderLayer)
    ]
    for name, layer in chosen.items():
        others = [owner for owner in owners[id(layer.weight)] if owner != name]
        if others:
            yield (
                f"{plugin}.targets: {name} shares its weight with {others[0]}, and the merged "
                f"weight would be wrong there; untie them, or add {name!r} to {plugin}.except_for"
            )
        if torch.backends.mha.get_fastpath_enabled() and name.rpartition(".")[0] in fast:
            yield (
                f"{plugin}.targets: the nn.TransformerEncoderLayer around {name} skips the adapter "
                f"in validation, unless the model calls "
                f"torch.backends.mha.set_fastpath_enabled(False)"
            )


def _unmatched_layers(
    setting: str, patterns: list[str], layers: dict[str, nn.Module], modules: dict[str, nn.Module]
) -> Iterator[str]:
    """Yield an error for each pattern that matches no linear layer."""
    for pattern in patterns:
        other = next((name for name in modules if name and matches(name, [pattern])), None)
        problem = unmatched(setting, [pattern], list(layers), "linear layer")
        if problem and other is not None:
            kind = type(modules[other]).__name__
            problem = [f"{setting}: {pattern!r} matches no linear layer ({other} is a {kind})"]
        yield from problem
