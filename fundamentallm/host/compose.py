"""From settings to plugins: make what is listed, check that it fits together, register it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import attrs
import pluggy

from fundamentallm.host.declare import plugin_name
from fundamentallm.host.discover import find, plugin_class
from fundamentallm.host.host import Host, answering, class_problems
from fundamentallm.host.sources import Source
from fundamentallm.host.structure import build, plain, suggest, written


@attrs.define
class Composed:
    """Checked settings: the application's own table and the plugins by instance name, in list
    order."""

    host: Host
    own: Any
    """The application's own table, as an instance of ``host.table``."""
    plugins: dict[str, Any]
    source: Source
    brought: dict[str, str]
    """Instance name -> who brings its class: a distribution and its version, or a file."""

    @property
    def tables(self) -> dict[str, Any]:
        """All settings, defaults included, as the TOML that composes to the same again."""
        tables = {"plugins": list(self.source.values["plugins"]), self.host.own: plain(self.own)}
        for name, instance in self.plugins.items():
            renamed = self.source.values.get(name, {}).get("plugin")
            if renamed and renamed.endswith(".py"):
                renamed = str(self.source.origin((name, "plugin")).folder / renamed)
            tables[name] = ({"plugin": renamed} if renamed else {}) | plain(instance)
        return tables


def compose(
    host: Host,
    source: Source,
    *,
    plugins: Sequence[object] = (),
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
) -> Composed:
    """Make the plugins that settings list, and check that all fits together.

    ``source`` is what ``read`` returned; it is used up. ``plugins`` are ready instances to use
    beside the listed ones; ``add`` and ``remove`` change the list. Raises ``host.error`` with every
    mistake; nothing is created.
    """
    if source.problems:  # of syntax: anything said beyond them would be a guess
        raise host.error(source.problems)
    own: Any = build(host.table, source.values.get(host.own, {}), source, (host.own,))
    listed, found = _listed(host, source, add, remove), find(host.name)
    built, brought = dict[str, Any](), dict[str, str]()
    for name, entry in listed.items():
        cls, brought[name] = plugin_class(host, source, name, entry, found)
        if cls is not None:
            built[name] = build(cls, _table(source, name), source, (name,))
    for instance in plugins:
        name, brought[name] = _given(host, source, instance, built)
        built[name] = instance
    known = {"plugins", host.own, *listed, *built, *remove}
    _claim_tables(source, known, {*found, *host.known})
    _check_hooks(host, source, built, brought)
    if listed.keys() <= built.keys():  # what a plugin would answer that was not found is unknown
        missing = [hook for hook in host.required if hook not in answering(host, built)]
        source.problems += [f"{hook}: no plugin answers; list one that does" for hook in missing]
    host.check(source, built | {host.own: own})
    if source.problems:
        raise host.error(source.problems)
    order(host, built)
    source.values["plugins"] = list(listed.values())
    return Composed(host, own, built, source, brought)


def register(host: Host, composed: Composed, defaults: Mapping[str, Any]) -> pluggy.PluginManager:
    """Register the plugins, so that they are called in list order, and the defaults they need."""
    registry = pluggy.PluginManager(host.name)
    registry.add_hookspecs(host.hooks)
    answers = answering(host, composed.plugins)
    core = {hook: staticmethod(answer) for hook, answer in defaults.items() if hook not in answers}
    registry.register(type("Defaults", (), core), "core")
    for name in reversed(order(host, composed.plugins)):  # pluggy calls the last one first
        registry.register(composed.plugins[name], name)
    return registry


def order(host: Host, plugins: Mapping[str, object]) -> list[str]:
    """Return the names in list order, moved only as far as ``before``/``after`` demand."""
    pairs = {pair for pair in permutations(plugins, 2) if _precedes(plugins, *pair)}
    done: list[str] = []
    while len(done) < len(plugins):
        left = [name for name in plugins if name not in done]
        ready = [name for name in left if not any((other, name) in pairs for other in left)]
        if not ready:
            circle = f"before/after of these plugins run in a circle: {', '.join(left)}"
            raise host.error([circle])
        done.append(ready[0])
    return done


def _listed(
    host: Host, source: Source, add: Sequence[str], remove: Sequence[str]
) -> dict[str, str]:
    """Return the listed entries by instance name: a local file's is its stem."""
    stated = source.values.get("plugins", [])
    offered = stated if isinstance(stated, list | tuple) else [stated]
    entries = [entry for entry in offered if isinstance(entry, str)]
    if offered is not stated or len(entries) < len(offered):
        source.blame(("plugins",), f"expected a list of plugin names, got {written(stated)}")
    listed: dict[str, str] = {}
    here = source.origin(("plugins",)).folder
    for entry, folder in [*((e, here) for e in entries), *((e, Path.cwd()) for e in add)]:
        local = entry.endswith(".py")
        name = Path(entry).stem if local else entry
        if name in listed or name in host.reserved:
            source.blame(("plugins",), f"{name!r} is listed twice, or a name of the core's")
        listed[name] = str(folder / entry) if local else entry
    for name in remove:
        if listed.pop(name, None) is None:
            source.blame(("plugins",), f"{name!r} is not listed{suggest(name, listed)}")
    return listed


def _table(source: Source, name: str) -> Any:
    table = source.values.get(name, {})
    return {k: v for k, v in table.items() if k != "plugin"} if isinstance(table, dict) else table


def _given(
    host: Host, source: Source, instance: object, built: Mapping[str, object]
) -> tuple[str, str]:
    name = plugin_name(type(instance))
    if name in built or name in host.reserved or not attrs.has(type(instance)):
        source.blame(("plugins",), f"{instance!r} is no @plugin object, or {name!r} is taken")
    return name, f"{type(instance).__module__}, given as an object"


def _precedes(plugins: Mapping[str, object], one: str, other: str) -> bool:
    mine, theirs = ({name, plugin_name(type(plugins[name]))} for name in (one, other))
    marks = getattr(plugins[one], "before", ()), getattr(plugins[other], "after", ())
    # A setting may have that name; it marks nothing.
    before, after = (mark if isinstance(mark, tuple) else () for mark in marks)
    return not (theirs.isdisjoint(before) and mine.isdisjoint(after))


def _check_hooks(
    host: Host, source: Source, plugins: Mapping[str, Any], brought: Mapping[str, str]
) -> None:
    """Note what is wrong with the plugins' hooks, alone and together."""
    problems = [
        f"{name} ({brought[name]}): {text}"
        for name, instance in plugins.items()
        for text in class_problems(host, type(instance))
    ]
    for hook, names in answering(host, plugins).items():
        for one, other in combinations(names, 2):
            both = f"{hook}: {one} ({brought[one]}) and {other} ({brought[other]})"
            ordered = _precedes(plugins, one, other) or _precedes(plugins, other, one)
            if host.kind(hook) == "edit" and not ordered:
                problems += [f"{both} edit the same thing; one class must declare before or after"]
            a, b = plugins[one], plugins[other]
            same = type(a) is type(b) and hook in getattr(a, "speaks_for_all", ())
            if host.kind(hook) == "exclusive" and not same:
                problems += [f"{both} both answer, but only one can"]
    for text in problems:
        source.blame(("plugins",), text)


def _claim_tables(source: Source, known: set[str], offered: set[str]) -> None:
    for name, value in source.values.items():
        # What a file takes over from one that it extends need not be in its own list.
        meant = name in offered or (isinstance(value, dict) and "plugin" in value)
        if name in known or (meant and source.origin((name,)).extended):
            continue
        text = f"unknown {'table' if isinstance(value, dict) else 'setting'}{suggest(name, known)}"
        text = "has a table here, but is not in the plugins list" if meant else text
        source.blame((name,), text)
