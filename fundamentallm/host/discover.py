"""Plugins where they are: in installed distributions, and in files beside the settings."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs

from fundamentallm.host.declare import plugin_name
from fundamentallm.host.host import Host, hook_methods
from fundamentallm.host.sources import Source
from fundamentallm.host.structure import suggest


@attrs.frozen
class Found:
    """An installed plugin: its entry point, loaded only when asked."""

    name: str
    distribution: str
    version: str
    load: Any


def find(group: str) -> dict[str, list[Found]]:
    """Return the installed plugins by name; more than one under a name is a conflict."""
    found: dict[str, list[Found]] = {}
    for entry in metadata.entry_points(group=group):
        by, version = (entry.dist.name, entry.dist.version) if entry.dist else ("?", "?")
        found.setdefault(entry.name, []).append(Found(entry.name, by, version, entry.load))
    return dict(sorted(found.items()))


def plugin_class(
    host: Host, source: Source, name: str, entry: str, found: Mapping[str, list[Found]]
) -> tuple[Any, str]:
    """Return the class behind a listed entry and who brings it; note a mistake if none is found."""
    table = source.values.get(name)
    wanted = str(table.get("plugin", entry) if isinstance(table, dict) else entry)
    path = source.origin((name, "plugin")).folder / wanted
    local = [Found(name, str(path), "", partial(_load_file, host, path))]
    offers = local if wanted.endswith(".py") else found.get(wanted, [])
    if len(offers) != 1:
        text = f"no installed plugin is named {wanted!r}"
        meant = suggest(wanted, {*found, *host.known})
        text += f": pip install {host.known[wanted]}" if wanted in host.known else meant
        if offers:
            text = f"plugin {wanted!r} is offered by {' and '.join(o.distribution for o in offers)}"
        source.blame((name, "plugin") if wanted != entry else ("plugins",), text)
        return None, ""
    who = f"{offers[0].distribution} {offers[0].version}".strip()
    try:
        cls = offers[0].load()
        if not (isinstance(cls, type) and attrs.has(cls)):
            raise TypeError(f"{cls!r} is not a @plugin class")  # noqa: TRY301 - told like the rest
    except Exception as error:  # noqa: BLE001 - whatever somebody's module raises
        text = f"{name} ({who}) cannot be loaded: {type(error).__name__}: {error}"
        source.blame(("plugins",), text)
        return None, who
    return cls, who


def _load_file(host: Host, path: Path) -> type:
    name = f"{host.name}_local_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[name] = module  # where attrs looks for the types that annotations name
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    classes = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and c.__module__ == name and any(hook_methods(host, c))
    ]
    chosen = [c for c in classes if plugin_name(c) == path.stem] or classes
    if len(chosen) != 1:
        raise ValueError(f"it has {len(classes)} plugins, and none named like the file")
    return chosen[0]
