"""Names of parameters and modules, and the glob patterns by which settings choose among them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from fundamentallm.errors import SettingsError
from fundamentallm.host import closest, suggest

if TYPE_CHECKING:
    from torch import nn

_SHOWN = 12
"""How many known names an error lists."""


def parameter_names(model: nn.Module) -> dict[str, list[str]]:
    """Return each parameter's first name with all its names (tied weights have several)."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return found


def matches(names: str | Iterable[str], patterns: Iterable[str]) -> bool:
    """Return whether a name, or one of several names of the same thing, matches a pattern."""
    names = [names] if isinstance(names, str) else list(names)
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def unmatched(
    setting: str, patterns: Iterable[str], names: Sequence[str], what: str = "parameter"
) -> list[str]:
    """Return an error line for each pattern that matches no name, with the closest known one.

    ``setting`` is the path of the setting that holds the patterns, such as ``"freeze.params"``;
    ``what`` is what the names are names of.
    """
    return [
        f"{setting}: {pattern!r} matches no {what}{_advice(pattern, names)}"
        for pattern in patterns
        if not matches(names, [pattern])
    ]


def find_blocks(
    model: nn.Module, patterns: Sequence[str] | None, setting: str
) -> dict[str, nn.Module]:
    """Return the blocks of a model by name, in the model's order, each module once.

    Without ``patterns`` these are the elements of the ``nn.ModuleList`` with the most parameters.
    Raises ``SettingsError``, beginning with ``setting``, if there is no such list, if a pattern
    matches nothing, or if it matches a container that has no ``forward``.
    """
    from torch import nn

    modules = {name: module for name, module in model.named_modules() if name}
    if patterns is None:
        return _largest_list(modules, setting)
    if problems := unmatched(setting, patterns, list(modules), "module"):
        raise SettingsError(problems)
    matched = [name for name in modules if matches(name, patterns)]
    # A pattern such as ``layers.*`` also matches every module inside of a layer.
    outer = [name for name in matched if not _is_inside(name, matched)]
    for name in outer:
        if isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
            raise SettingsError(
                f"{setting}: {name!r} is a container that is never called; "
                f"name the modules in it: {name}.*"
            )
    return {name: modules[name] for name in outer}


def _largest_list(modules: dict[str, nn.Module], setting: str) -> dict[str, nn.Module]:
    from torch import nn

    lists = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if not lists:
        raise SettingsError(
            f"{setting}: the model has no nn.ModuleList to take the blocks from; "
            f'name them, for example {setting} = ["layers.*"]'
        )
    # Of equals the first, which is the outer one.
    largest = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return {f"{largest}.{index}": block for index, block in lists[largest].named_children()}


def _is_inside(name: str, names: Iterable[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in names)


def _advice(pattern: str, names: Sequence[str]) -> str:
    """Suggest the closest name or pattern; numbered modules count as one pattern."""
    known: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        known |= dict.fromkeys(".".join([*parts[:n], "*"]) for n in range(1, len(parts)))
        known[re.sub(r"\.\d+(?=\.|$)", ".*", name)] = None
        known[name] = None
    if closest(pattern, known) is not None:
        return suggest(pattern, known)
    top = [name for name in known if name.count(".") <= 1]
    more = ", …" if len(top) > _SHOWN else ""
    return f" (known: {', '.join(top[:_SHOWN])}{more})" if top else " (there is none)"
