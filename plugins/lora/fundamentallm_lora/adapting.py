"""Which layers get adapters, and which parameters are trained."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn

from fundamentallm import SettingsError
from fundamentallm_lora.layer import LoraLinear

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fundamentallm import Run
    from fundamentallm_lora import Lora

_SHOWN = 12


def adapt(run: Run, settings: Lora, plugin: str) -> list[str]:
    """Add adapters to the targets, freeze the rest, and return the names of the adapted layers.

    Raises ``SettingsError`` if a glob matches nothing, or a target cannot have an adapter.
    """
    model = run.model
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    others = {name: f"is a {type(module).__name__}" for name, module in model.named_modules()}
    names = defaultdict[int, list[str]](list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    known = [alias for aliases in names.values() for alias in aliases]
    problems = [
        *_unmatched(f"{plugin}.targets", settings.targets, layers, others),
        *_unmatched(f"{plugin}.except_for", settings.except_for, layers, others),
        *_unmatched(f"{plugin}.train_also", settings.train_also, known, {}),
    ]
    chosen = {
        name: layer
        for name, layer in layers.items()
        if _matches(name, settings.targets) and not _matches(name, settings.except_for)
    }
    problems += _unfit(model, chosen, plugin)
    if not chosen and not problems:
        problems = [f"{plugin}.except_for: leaves no layer to adapt"]
    if problems:
        raise SettingsError(problems)
    for parameter in model.parameters():
        also = any(_matches(name, settings.train_also) for name in names[id(parameter)])
        parameter.requires_grad = parameter.requires_grad and also
    for name, layer in chosen.items():
        # Each its own seed: an adapter begins the same whatever other layers have one.
        generator = torch.Generator().manual_seed(run.seed_for(f"lora/{name}"))
        LoraLinear.adapt(layer, settings, generator)
    return list(chosen)


def _unfit(model: nn.Module, chosen: dict[str, nn.Linear], plugin: str) -> Iterator[str]:
    """Yield what is wrong with layers whose weight is used other than by calling them."""
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
                f"{plugin}.targets: {name} has its weight in common with {others[0]}: merged, it "
                f"would be wrong there; untie them, or add {name!r} to {plugin}.except_for"
            )
        if torch.backends.mha.get_fastpath_enabled() and name.rpartition(".")[0] in fast:
            yield (
                f"{plugin}.targets: the nn.TransformerEncoderLayer around {name} passes by the "
                f"adapter in validation, unless the model calls "
                f"torch.backends.mha.set_fastpath_enabled(False)"
            )


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _unmatched(
    setting: str, globs: list[str], names: Iterable[str], others: dict[str, str]
) -> Iterator[str]:
    known = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    for glob in globs:
        if any(fnmatchcase(name, glob) for name in names):
            continue
        what = "linear layer" if others else "parameter"
        wrong = next((name for name in others if name and fnmatchcase(name, glob)), None)
        close = difflib.get_close_matches(glob, known, n=1)
        told = ", ".join([*known][:_SHOWN]) or "there is none"
        advice = f"did you mean {close[0]!r}?" if close else f"known: {told}"
        advice = f"{wrong} {others[wrong]}" if wrong else advice
        yield f"{setting}: {glob!r} matches no {what} ({advice})"
