"""Which parameters an optimizer gets, and in which groups."""

from __future__ import annotations

import difflib
from collections import defaultdict
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Protocol

from fundamentallm import SettingsError

if TYPE_CHECKING:
    from torch import nn

    from fundamentallm import Run
    from fundamentallm_optimizers import Group

# Where PyTorch 2.7 and later have fused kernels for Adam, AdamW and SGD.
FUSED_DEVICES = ("cpu", "cuda", "mps")


class Choices(Protocol):
    """What the three optimizers' settings have in common."""

    lr: float
    weight_decay: float
    decay: Any
    fused: bool | None
    groups: list[Group]


def divide(run: Run, choices: Choices) -> list[dict[str, Any]]:
    """Return the groups of ``run.model``'s parameters, for a PyTorch optimizer.

    Frozen parameters are in them too: PyTorch passes by what has no gradient and keeps no state
    for it, and they may be unfrozen later. The parameters that no pattern names come first, then
    each group in the order of the settings; either in up to two parts, with and without decay.
    Within a part the order is the model's. A parameter that is shared appears once, and any of its
    names matches. Raises ``SettingsError`` if nothing is trainable, or if a group would be empty.
    """
    parameters = _by_parameter(run.model)
    if not any(parameter.requires_grad for parameter in parameters):
        raise SettingsError(f"{_name(run, choices)}: the model has no trainable parameter")
    parts: dict[tuple[int, float], list[nn.Parameter]] = defaultdict(list)
    for parameter, names in parameters.items():
        index = _place(names, choices.groups)
        parts[index, _weight_decay(parameter, index, choices)].append(parameter)
    _check(run, choices, {index for index, _ in parts})
    # Sorted: by group, and in it the decayed ones first.
    return [
        {"params": parts[key], "lr": _lr(key[0], choices), "weight_decay": key[1]}
        for key in sorted(parts, key=lambda key: (key[0], -key[1]))
    ]


def use_fused(run: Run, choices: Choices, *, by_default: bool = True) -> bool | None:
    """Return True for one fused kernel, None for PyTorch's choice among its other ways.

    ``by_default`` is whether to fuse where the settings do not say.

    Raises ``SettingsError`` if fused kernels are demanded where there are none.
    """
    unfit = [
        f"{names[0]} is {parameter.dtype} on {parameter.device.type}"
        for parameter, names in _by_parameter(run.model).items()
        if parameter.device.type not in FUSED_DEVICES or not parameter.is_floating_point()
    ]
    if unfit and choices.fused:
        raise SettingsError(
            f"{_name(run, choices)}.fused: needs floating point on one of "
            f"{', '.join(FUSED_DEVICES)}, but {unfit[0]}; leave fused out"
        )
    # Not False: PyTorch takes that for the slowest of its other ways.
    wanted = by_default if choices.fused is None else choices.fused
    return True if wanted and not unfit else None


def _by_parameter(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return every parameter that can have a gradient once, with all the names it goes by."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # Integers, such as quantized weights, are never trained, and no fused kernel takes them.
        if parameter.is_floating_point() or parameter.is_complex():
            found.setdefault(parameter, []).append(name)
    return found


def _place(names: list[str], groups: list[Group]) -> int:
    """Return the number of the first group that matches one of the names, -1 if none does."""
    matching = (
        index
        for index, group in enumerate(groups)
        if any(fnmatchcase(name, group.pattern) for name in names)
    )
    return next(matching, -1)


def _weight_decay(parameter: nn.Parameter, index: int, choices: Choices) -> float:
    if index >= 0 and (stated := choices.groups[index].weight_decay) is not None:
        return stated
    return choices.weight_decay if choices.decay == "all" or parameter.ndim >= 2 else 0.0


def _lr(index: int, choices: Choices) -> float:
    if index < 0:
        return choices.lr
    group = choices.groups[index]
    scale = 1.0 if group.lr_scale is None else group.lr_scale
    return choices.lr * scale if group.lr is None else group.lr


def _check(run: Run, choices: Choices, filled: set[int]) -> None:
    """Raise ``SettingsError`` for every group that got no parameter, with the likely reason."""
    empty = [i for i in range(len(choices.groups)) if i not in filled]
    plugin = _name(run, choices)
    problems = [f"{plugin}.groups.{i}.pattern: {_why_empty(run, choices, i)}" for i in empty]
    if problems:
        raise SettingsError(problems)


def _why_empty(run: Run, choices: Choices, index: int) -> str:
    pattern = choices.groups[index].pattern
    known = [name for names in _by_parameter(run.model).values() for name in names]
    if any(fnmatchcase(name, pattern) for name in known):
        return f"{pattern!r} matches only parameters that earlier groups take; put it before them"
    if any(fnmatchcase(name, pattern) for name, _ in run.model.named_parameters()):
        return f"{pattern!r} matches only parameters of whole numbers, which have no gradient"
    close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or known[:3]
    examples = f"there are {len(known)}, such as {', '.join(close)}"
    return f"{pattern!r} matches no parameter; {examples}"


def _name(run: Run, choices: Choices) -> str:
    """Return the name that the plugin goes by in this run's settings."""
    return next(name for name, listed in run.plugins.items() if listed is choices)
