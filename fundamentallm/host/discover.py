"""Find plugins in installed distributions and in local files."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs

from fundamentallm.host import local
from fundamentallm.host.declare import plugin_name
from fundamentallm.host.host import Host, hook_methods
from fundamentallm.host.mistakes import suggest
from fundamentallm.host.sources import Provenance, Source


@attrs.frozen
class Found:
    """An installed plugin: its entry point, loaded only when asked."""

    name: str
    distribution: str
    version: str
    load: Any


class NoPluginError(Exception):
    """A module was loaded, but what it has is no plugin."""


def find(group: str) -> dict[str, list[Found]]:
    """Return the installed plugins by name; more than one under a name is a conflict."""
    found: dict[str, list[Found]] = {}
    for entry in metadata.entry_points(group=group):
        by, version = (entry.dist.name, entry.dist.version) if entry.dist else ("?", "?")
        found.setdefault(entry.name, []).append(Found(entry.name, by, version, entry.load))
    return dict(sorted(found.items()))


def plugin_class(
    host: Host,
    source: Source,
    listed: tuple[str, str],
    found: Mapping[str, list[Found]],
) -> tuple[Any, Provenance | None]:
    """Return the class of a listed plugin, (name, entry), and its provenance.

    Where none is found, note a mistake and return None for the class.
    """
    (name, entry), wanted = listed, wanted_plugin(source, *listed)
    if wanted.endswith(".py"):
        path = source.origin((name, "plugin")).folder / wanted
        return _loaded(source, name, partial(_load_file, host, path), Provenance("file", str(path)))
    offers = found.get(wanted, [])
    if len(offers) == 1:
        one = offers[0]
        who = Provenance("distribution", one.distribution, one.version)
        return _loaded(source, name, one.load, who)
    text = f"no installed plugin is named {wanted!r}"
    if offers:
        text = f"plugin {wanted!r} is offered by {' and '.join(o.distribution for o in offers)}"
    elif (had := source.recorded.get(name)) is not None and had.kind == "distribution":
        # The version that the run was recorded with, since the run is to be continued.
        text += f": pip install {had.name}=={had.version}, or leave it out: --no-plugin {name}"
    elif wanted in host.known:
        text += f": pip install {host.known[wanted].distribution}"
    else:
        text += suggest(wanted, {*found, *host.known})
    source.blame((name, "plugin") if wanted != entry else ("plugins",), text, "plugin")
    return None, None


def wanted_plugin(source: Source, name: str, entry: str) -> str:
    """Return what a listed entry means: the name of a plugin, or the path of a local file."""
    table = source.values.get(name)
    return str(table.get("plugin", entry) if isinstance(table, dict) else entry)


def _loaded(source: Source, name: str, load: Any, who: Provenance) -> tuple[Any, Provenance]:
    try:
        cls = load()
        if not (isinstance(cls, type) and attrs.has(cls)):
            shown = f"class {cls.__name__}" if isinstance(cls, type) else repr(cls)
            raise NoPluginError(f"{shown} is not marked with @plugin")  # noqa: TRY301
    except NoPluginError as error:
        source.blame(("plugins",), f"{name} ({who}): {error}", "plugin")
    except Exception as error:  # noqa: BLE001 - a module of anyone may raise anything
        text = (
            f"{name} ({who}) cannot be loaded: {_line(error, who)}{type(error).__name__}: {error}"
        )
        source.blame(("plugins",), text, "plugin")
    else:
        return cls, who
    return None, who


def _line(error: Exception, who: Provenance) -> str:
    """Return the innermost line of a local file and its neighbours that raised an error."""
    folder = Path(who.name).parent
    frames = traceback.extract_tb(error.__traceback__) if who.kind == "file" else ()
    lines = [f"{f.filename}:{f.lineno}: " for f in frames if Path(f.filename).parent == folder]
    return lines[-1] if lines else ""


def _load_file(host: Host, path: Path) -> type:
    module = local.load(path)
    # Only the classes of the file itself, and none that it imports.
    own = [
        c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__
    ]
    classes = [c for c in own if any(hook_methods(host, c))]
    chosen = [c for c in classes if plugin_name(c) == path.stem] or classes
    if len(chosen) == 1:
        return chosen[0]
    if classes:
        names = ", ".join(c.__name__ for c in classes)
        raise NoPluginError(
            f"the file has several plugins ({names}), and none of them is named like the file"
        )
    marked = [c.__name__ for c in own if attrs.has(c)]
    if marked:
        raise NoPluginError(f"class {marked[0]} has no method that is marked with @hookimpl")
    raise NoPluginError(
        "the file has no plugin: expected a class marked with @plugin, with methods marked with "
        "@hookimpl"
    )
