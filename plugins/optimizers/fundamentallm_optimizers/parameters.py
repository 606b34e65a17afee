"""Which parameters an optimizer gets, and in which groups."""

from __future__ import annotations

import difflib
from collections import defaultdict
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from fundamentallm import SettingsError

if TYPE_CHECKING:
    from torch import nn

    from fundamentallm import Run
    from fundamentallm_optimizers import Group

    Parameters: TypeAlias = dict[nn.Parameter, list[str]]  # with all the names each goes by

# Where PyTorch 2.7 and later have fused kernels for Adam, AdamW and SGD.
FUSED_DEVICES = ("cpu", "cuda", "mps")


class Choices(Protocol):
    """What the optimizers' settings have in common."""

    lr: float
    weight_decay: float
    decay: Any
    groups: list[Group]


class Fusible(Protocol):
    """The settings of an optimizer that PyTorch has fused kernels for."""

    fused: bool | None


class Own(NamedTuple):
    """How the parameters are trained as far as no group says anything else."""

    lr: float
    weight_decay: float
    decay: str


def divide(run: Run, choices: Choices) -> list[dict[str, Any]]:
    """Return the groups of ``run.model``'s parameters, for a PyTorch optimizer.

    Frozen parameters are in them too: PyTorch passes by what has no gradient and keeps no state
    for it, and they may be unfrozen later. Raises ``SettingsError`` if nothing is trainable, or if
    a group would be empty.
    """
    own = Own(choices.lr, choices.weight_decay, choices.decay)
    return grouped(checked(run, choices), choices.groups, own)


def checked(run: Run, choices: Choices) -> Parameters:
    """Return the model's parameters; raise ``SettingsError`` if none can be trained, or if a group
    gets none."""
    parameters = by_parameter(run.model)
    plugin = name_of(run, choices)
    if not any(parameter.requires_grad for parameter in parameters):
        raise SettingsError(f"{plugin}: the model has no trainable parameter")
    filled = {_place(names, choices.groups) for names in parameters.values()}
    problems = [
        f"{plugin}.groups.{index}.pattern: {_why_empty(run, group.pattern)}"
        for index, group in enumerate(choices.groups)
        if index not in filled
    ]
    if problems:
        raise SettingsError(problems)
    return parameters


def grouped(parameters: Parameters, groups: list[Group], own: Own) -> list[dict[str, Any]]:
    """Return the groups of some parameters, for a PyTorch optimizer.

    Those that no pattern names come first, then each group in the order of the settings; either in
    up to two parts, with and without decay. Within a part the order is the model's. A parameter
    that is shared appears once, and any of its names matches.
    """
    parts: dict[tuple[int, float], list[nn.Parameter]] = defaultdict(list)
    for parameter, names in parameters.items():
        index = _place(names, groups)
        group = groups[index] if index >= 0 else None
        parts[index, _weight_decay(parameter, group, own)].append(parameter)
    # Sorted: by group, and in it the decayed ones first.
    return [
        {
            "params": parts[key],
            "weight_decay": key[1],
            "lr": own.lr if key[0] < 0 else _lr(groups[key[0]], own),
        }
        for key in sorted(parts, key=lambda key: (key[0], -key[1]))
    ]


def use_fused(run: Run, choices: Fusible, *, by_default: bool = True) -> bool | None:
    """Return True for one fused kernel, None for PyTorch's choice among its other ways.

    ``by_default`` is whether to fuse where the settings do not say. Raises ``SettingsError`` if
    fused kernels are demanded where there are none.
    """
    unfit = [
        f"{names[0]} is {parameter.dtype} on {parameter.device.type}"
        for parameter, names in by_parameter(run.model).items()
        if parameter.device.type not in FUSED_DEVICES or not parameter.is_floating_point()
    ]
    if unfit and choices.fused:
        raise SettingsError(
            f"{name_of(run, choices)}.fused: needs floating point on one of "
            f"{', '.join(FUSED_DEVICES)}, but {unfit[0]}; leave fused out"
        )
    # Not False: PyTorch takes that for the slowest of its other ways.
    wanted = by_default if choices.fused is None else choices.fused
    return True if wanted and not unfit else None


def by_parameter(model: nn.Module) -> Parameters:
    """Return every parameter that can have a gradient once, with all the names it goes by."""
    found: Parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # Integers, such as quantized weights, are never trained, and no fused kernel takes them.
        if parameter.is_floating_point() or parameter.is_complex():
            found.setdefault(parameter, []).append(name)
    return found


def matches(names: list[str], pattern: str) -> bool:
    """Whether a glob matches one of a parameter's names."""
    return any(fnmatchcase(name, pattern) for name in names)


def unmatched(run: Run, pattern: str) -> str:
    """Say that a pattern matches no parameter, and which names come close to it."""
    known = [name for names in by_parameter(run.model).values() for name in names]
    close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4) or known[:3]
    examples = f"there are {len(known)}, such as {', '.join(close)}"
    return f"{pattern!r} matches no parameter; {examples}"


def name_of(run: Run, choices: object) -> str:
    """Return the name that the plugin goes by in this run's settings."""
    return next(name for name, listed in run.plugins.items() if listed is choices)


def _place(names: list[str], groups: list[Group]) -> int:
    """Return the number of the first group that matches one of the names, -1 if none does."""
    fitting = (index for index, group in enumerate(groups) if matches(names, group.pattern))
    return next(fitting, -1)


def _weight_decay(parameter: nn.Parameter, group: Group | None, own: Own) -> float:
    if group is not None and group.weight_decay is not None:
        return group.weight_decay
    return own.weight_decay if own.decay == "all" or parameter.ndim >= 2 else 0.0


def _lr(group: Group, own: Own) -> float:
    scale = 1.0 if group.lr_scale is None else group.lr_scale
    return own.lr * scale if group.lr is None else group.lr


def _why_empty(run: Run, pattern: str) -> str:
    if any(matches(names, pattern) for names in by_parameter(run.model).values()):
        return f"{pattern!r} matches only parameters that earlier groups take; put it before them"
    if any(fnmatchcase(name, pattern) for name, _ in run.model.named_parameters()):
        return f"{pattern!r} matches only parameters of whole numbers, which have no gradient"
    return unmatched(run, pattern)
