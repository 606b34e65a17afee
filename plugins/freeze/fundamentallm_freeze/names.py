"""The names that patterns are held against, and what to say of a pattern that matches none."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import nn

_SHOWN = 12


def parameter_names(model: nn.Module) -> dict[str, list[str]]:
    """Return every parameter's first name with all the names it goes by, in the model's order."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return found


def unmatched(
    setting: str, globs: Iterable[str], names: list[str], what: str = ""
) -> Iterator[str]:
    """Yield a sentence for every glob that matches none of ``names``."""
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            yield f"{setting}: {glob!r} matches no {what}parameter{_advice(glob, names)}"


def _advice(glob: str, names: list[str]) -> str:
    known = _globs(names)
    close = difflib.get_close_matches(glob, known, n=1)
    if close:
        return f" (did you mean {close[0]!r}?)"
    top = [one for one in known if one.count(".") <= 1]
    more = ", …" if len(top) > _SHOWN else ""
    return f" (known: {', '.join(top[:_SHOWN])}{more})" if top else " (there is none)"


def _globs(names: list[str]) -> list[str]:
    """Return the names, and a glob for every module that has some of them below it."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        found |= dict.fromkeys(".".join([*parts[:n], "*"]) for n in range(1, len(parts)))
        found[name] = None
    return list(found)
