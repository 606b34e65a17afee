"""Which modules of a model are its blocks."""

from __future__ import annotations

import difflib
import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn

from fundamentallm import SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


def find_blocks(model: nn.Module, globs: list[str] | None, plugin: str) -> dict[str, nn.Module]:
    """Return the blocks of ``model`` by name, in its order, each module once.

    Without ``globs`` they are the elements of the ``nn.ModuleList`` with the most parameters.
    ``plugin`` is whose settings these are. Raises ``SettingsError`` if there are no blocks, or if a
    glob matches nothing or what has no ``forward``.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if globs is None:
        return _largest_list(modules, plugin)
    missing = list(_unmatched(globs, modules, plugin))
    if missing:
        raise SettingsError(missing)
    matched = [name for name in modules if any(fnmatchcase(name, glob) for glob in globs)]
    outer = [name for name in matched if not _is_inside(name, matched)]
    for name in outer:
        if isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
            raise SettingsError(
                f"{plugin}.blocks: {name!r} is a container that is never called; "
                f"name what is in it: {name}.*"
            )
    return {name: modules[name] for name in outer}


def _largest_list(modules: dict[str, nn.Module], plugin: str) -> dict[str, nn.Module]:
    lists = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if not lists:
        raise SettingsError(
            f"{plugin}.blocks: the model has no nn.ModuleList to take the blocks from; name them: "
            f'{plugin}.blocks = ["layers.*"], say'
        )
    # Of equals the first, which is the outer one.
    largest = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return {f"{largest}.{index}": block for index, block in lists[largest].named_children()}


def _is_inside(name: str, names: Iterable[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in names)


def _unmatched(globs: list[str], names: Iterable[str], plugin: str) -> Iterator[str]:
    known = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            close = difflib.get_close_matches(glob, known, n=1)
            advice = f" (did you mean {close[0]!r}?)" if close else ""
            top = ", ".join(name for name in names if "." not in name)
            yield f"{plugin}.blocks: {glob!r} matches no module{advice or f' (known: {top})'}"
