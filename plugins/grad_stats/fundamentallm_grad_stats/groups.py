"""Group parameters by their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fundamentallm import matches

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

REST = "rest"


def group_of(name: str, per: str) -> str:
    """Return the group of a parameter: ``blocks.3.mlp.up.weight`` is in the block ``blocks.3`` and
    in the module ``blocks.3.mlp.up``. Without a number, the module is the block."""
    parts = name.lower().split(".")  # like all names of metrics
    if per == "parameter" or len(parts) == 1:
        return ".".join(parts)
    numbered = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
    end = numbered[0] + 1 if per == "block" and numbered else len(parts) - 1
    return ".".join(parts[:end])


def grouped(names: Iterable[str], per: str) -> dict[str, list[str]]:
    """Return the names of each group, in order of first occurrence."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(group_of(name, per), []).append(name)
    return found


def matched(names: Iterable[str], patterns: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the names of each pattern, the first that matches; the others are the rest."""
    found: dict[str, list[str]] = {group: [] for group in (*patterns, REST)}
    for name in names:
        matching = (group for group, pattern in patterns.items() if matches(name, [pattern]))
        found[next(matching, REST)].append(name)
    return found


def merged(groups: dict[str, list[str]], most: int) -> dict[str, list[str]]:
    """Merge equal numbers of neighbours until there are at most ``most`` groups. Their names are
    then such as ``blocks.0..blocks.3``."""
    items = list(groups.items())
    size = -(-len(items) // most)
    chunks = [items[at : at + size] for at in range(0, len(items), size)]
    return {
        chunk[0][0] if len(chunk) == 1 else f"{chunk[0][0]}..{chunk[-1][0]}": [
            name for _, names in chunk for name in names
        ]
        for chunk in chunks
    }
