"""Divide a model's parameters into the groups of a PyTorch optimizer."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from fundamentallm import SettingsError, matches, parameter_names, unmatched

if TYPE_CHECKING:
    from torch import nn

    from fundamentallm import Run
    from fundamentallm_optimizers import Group

    Parameters: TypeAlias = dict[nn.Parameter, list[str]]  # each with all its names

# Where PyTorch has fused kernels for Adam, AdamW and SGD.
FUSED_DEVICES = ("cpu", "cuda", "mps")


class OptimizerSettings(Protocol):
    """The settings that all optimizers have."""

    lr: float
    weight_decay: float
    decay: Any
    groups: list[Group]


class FusedSettings(Protocol):
    """The settings of an optimizer that PyTorch has fused kernels for."""

    fused: bool | None


class Defaults(NamedTuple):
    """The values for parameters whose group states no others."""

    lr: float
    weight_decay: float
    decay: str


def param_groups(run: Run, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Return the groups of ``run.model``'s parameters for a PyTorch optimizer.

    Frozen parameters are included: PyTorch skips parameters without a gradient and creates no state
    for them, and they may be unfrozen later. Raises ``SettingsError`` if nothing is trainable, or
    if a group would be empty.
    """
    defaults = Defaults(settings.lr, settings.weight_decay, settings.decay)
    return make_groups(checked_parameters(run, settings), settings.groups, defaults)


def checked_parameters(run: Run, settings: OptimizerSettings) -> Parameters:
    """Return the model's parameters with their names.

    Raises ``SettingsError`` if none is trainable, or if a group of the settings gets none.
    """
    parameters = float_parameters(run.model)
    plugin = run.name_of(settings)
    if not any(parameter.requires_grad for parameter in parameters):
        raise SettingsError(f"{plugin}: the model has no trainable parameter")
    filled = {_group_index(names, settings.groups) for names in parameters.values()}
    problems = [
        problem
        for index, group in enumerate(settings.groups)
        if index not in filled
        for problem in _why_empty(run, group.pattern, f"{plugin}.groups.{index}.pattern")
    ]
    if problems:
        raise SettingsError(problems)
    return parameters


def make_groups(
    parameters: Parameters, groups: list[Group], defaults: Defaults
) -> list[dict[str, Any]]:
    """Return the groups of some parameters for a PyTorch optimizer.

    Parameters that no pattern matches come first, then each group in the order of the settings.
    Each of these is split into one part with weight decay and one without, if it needs both. Within
    a part the order is the model's. A shared parameter appears once, and any of its names matches.
    """
    parts: dict[tuple[int, float], list[nn.Parameter]] = defaultdict(list)
    for parameter, names in parameters.items():
        index = _group_index(names, groups)
        group = groups[index] if index >= 0 else None
        parts[index, _weight_decay(parameter, group, defaults)].append(parameter)
    # Sorted by group, and within a group with the decayed parameters first.
    return [
        {
            "params": parts[key],
            "weight_decay": key[1],
            "lr": defaults.lr if key[0] < 0 else _lr(groups[key[0]], defaults),
        }
        for key in sorted(parts, key=lambda key: (key[0], -key[1]))
    ]


def use_fused(run: Run, settings: FusedSettings, *, by_default: bool = True) -> bool | None:
    """Return True for one fused kernel, or None for PyTorch's default implementation.

    ``by_default`` is whether to fuse if the settings do not say. Raises ``SettingsError`` if the
    settings demand fused kernels for parameters that have none.
    """
    unsupported = [
        f"{names[0]} is {parameter.dtype} on {parameter.device.type}"
        for parameter, names in float_parameters(run.model).items()
        if parameter.device.type not in FUSED_DEVICES or not parameter.is_floating_point()
    ]
    if unsupported and settings.fused:
        raise SettingsError(
            f"{run.name_of(settings)}.fused: needs floating point on one of "
            f"{', '.join(FUSED_DEVICES)}, but {unsupported[0]}; leave fused out"
        )
    # Not False: that would choose PyTorch's slowest implementation, a loop over the parameters.
    wanted = by_default if settings.fused is None else settings.fused
    return True if wanted and not unsupported else None


def is_divided(model: nn.Module) -> bool:
    """Return whether parameters are divided among several processes."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def float_parameters(model: nn.Module) -> Parameters:
    """Return every floating-point or complex parameter once, with all its names."""
    parameters = dict(model.named_parameters())
    # Integers, such as quantized weights, are never trained, and no fused kernel accepts them.
    return {
        parameters[first]: names
        for first, names in parameter_names(model).items()
        if parameters[first].is_floating_point() or parameters[first].is_complex()
    }


def no_match(run: Run, pattern: str, setting: str) -> list[str]:
    """Return the error for a pattern that matches no parameter; empty if it matches one."""
    known = [name for names in float_parameters(run.model).values() for name in names]
    return unmatched(setting, [pattern], known)


def _group_index(names: list[str], groups: list[Group]) -> int:
    """Return the index of the first group that matches one of the names, or -1."""
    matching = (index for index, group in enumerate(groups) if matches(names, [group.pattern]))
    return next(matching, -1)


def _weight_decay(parameter: nn.Parameter, group: Group | None, defaults: Defaults) -> float:
    if group is not None and group.weight_decay is not None:
        return group.weight_decay
    return defaults.weight_decay if defaults.decay == "all" or parameter.ndim >= 2 else 0.0


def _lr(group: Group, defaults: Defaults) -> float:
    scale = 1.0 if group.lr_scale is None else group.lr_scale
    return defaults.lr * scale if group.lr is None else group.lr


def _why_empty(run: Run, pattern: str, setting: str) -> list[str]:
    if problem := no_match(run, pattern, setting):
        if matches([name for name, _ in run.model.named_parameters()], [pattern]):
            return [f"{setting}: {pattern!r} matches only integer parameters, without gradients"]
        return problem
    return [f"{setting}: {pattern!r} matches only parameters of earlier groups; list it before"]
