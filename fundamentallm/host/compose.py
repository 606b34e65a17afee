"""From settings to plugins: make what is listed, check that it fits together, register it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import attrs
import pluggy

from fundamentallm.host import local
from fundamentallm.host.declare import plugin_name
from fundamentallm.host.discover import find, plugin_class, wanted_plugin
from fundamentallm.host.host import Host, answering, class_problems
from fundamentallm.host.mistakes import Mistake, suggest
from fundamentallm.host.sources import Provenance, Source
from fundamentallm.host.structure import build, plain


@attrs.define
class Composed:
    """Checked settings: the application's own table and the plugins by instance name, in list
    order."""

    host: Host
    own: Any
    """The application's own table, as an instance of ``host.table``."""
    plugins: dict[str, Any]
    source: Source
    brought: dict[str, Provenance]
    """Where the class of each plugin comes from, by instance name."""

    @property
    def tables(self) -> dict[str, Any]:
        """All settings, defaults included, as the TOML that composes to the same again."""
        tables = {"plugins": list(self.source.values["plugins"]), self.host.own: plain(self.own)}
        for name, instance in self.plugins.items():
            renamed = self.source.values.get(name, {}).get("plugin")
            if renamed and renamed.endswith(".py"):
                # Absolute, since the recorded settings lie in another folder.
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

    ``source`` is what ``read`` returned, and is changed. ``plugins`` are instances to use together
    with the listed ones; ``add`` and ``remove`` change the list. Raises ``host.error`` with every
    mistake; creates nothing.
    """
    if source.mistakes:  # of syntax: what they hide can only be guessed
        raise host.error(source.mistakes)
    own: Any = build(host.table, source.values.get(host.own, {}), source, (host.own,))
    listed, found = _listed(host, source, add, remove), find(host.name)
    # Before any file is loaded: it may import modules of its folder.
    _use_folders(source, listed)
    built, brought = dict[str, Any](), dict[str, Provenance]()
    for name, entry in listed.items():
        cls, who = plugin_class(host, source, (name, entry), found)
        if cls is not None and who is not None:
            built[name], brought[name] = build(cls, _table(source, name), source, (name,)), who
    for instance in plugins:
        if _is_plugin_object(host, source, instance, built):
            name = plugin_name(type(instance))
            built[name] = instance
            brought[name] = Provenance("object", type(instance).__module__)
    known = {"plugins", host.own, *listed, *built, *remove}
    _claim_tables(source, known, {*found, *host.known})
    _check_hooks(host, source, built, brought)
    _check_required(host, source, built)
    host.check(source, built | {host.own: own})
    if source.mistakes:
        raise host.error(source.mistakes)
    # Only to raise an error for a circle now, before anything is started.
    order(host, built)
    # With the absolute paths of local files, so that the record composes from any folder.
    source.values["plugins"] = list(listed.values())
    return Composed(host, own, built, source, brought)


def register(host: Host, composed: Composed, defaults: Mapping[str, Any]) -> pluggy.PluginManager:
    """Register the plugins, so that they are called in list order, and the defaults they need."""
    files = [Path(who.name) for who in composed.brought.values() if who.kind == "file"]
    if files:
        # Again: another composition may have taken these folders out in between.
        local.use(file.parent for file in files)
    registry = pluggy.PluginManager(host.name)
    registry.add_hookspecs(host.hooks)
    answers = answering(host, composed.plugins)
    # Where a plugin answers, a default would be a second answer.
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
            raise host.error([Mistake((), "hook", circle)])
        # One at a time, and the first in the list: so no plugin moves without need.
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
        source.note(Mistake(("plugins",), "type", "a list of plugin names", stated))
    listed: dict[str, str] = {}
    here = source.origin(("plugins",)).folder
    # A path in a file is relative to that file, one on the command line to the working directory.
    for entry, folder in [*((e, here) for e in entries), *((e, Path.cwd()) for e in add)]:
        local = entry.endswith(".py")
        name = Path(entry).stem if local else entry
        if name in listed or name in host.reserved:
            text = f"{name!r} is listed twice, or a name of the core's"
            source.blame(("plugins",), text, "plugin")
        listed[name] = str(folder / entry) if local else entry
    for name in remove:
        if listed.pop(name, None) is None:
            source.blame(("plugins",), f"{name!r} is not listed{suggest(name, listed)}", "plugin")
    return listed


def _table(source: Source, name: str) -> Any:
    table = source.values.get(name, {})
    return {k: v for k, v in table.items() if k != "plugin"} if isinstance(table, dict) else table


def _use_folders(source: Source, listed: Mapping[str, str]) -> None:
    """Make the modules in the folders of the listed local plugin files importable."""
    wanted = {name: wanted_plugin(source, name, entry) for name, entry in listed.items()}
    files = [
        source.origin((name, "plugin")).folder / entry
        for name, entry in wanted.items()
        if entry.endswith(".py")
    ]
    if files:
        local.use(file.parent for file in files)


def _check_required(host: Host, source: Source, built: Mapping[str, object]) -> None:
    """Note which required hooks no plugin answers."""
    if any(mistake.kind == "plugin" for mistake in source.mistakes):
        return  # a plugin that was not found might answer them
    answers = answering(host, built)
    for hook in (hook for hook in host.required if hook not in answers):
        source.blame(("plugins",), _advice(host, hook), "required", hook)


def _advice(host: Host, hook: str) -> str:
    """Say what to list so that a required hook has an answer."""
    role = next((role for role, hooks in host.roles.items() if hook in hooks), None)
    names = [name for name, one in host.known.items() if one.role == role]
    if role is None or not names:
        return f"no plugin answers {hook}: list one that does"
    return f"no {role}: list one of {', '.join(names)}, or a plugin that answers {hook}"


def _is_plugin_object(
    host: Host, source: Source, instance: object, built: Mapping[str, object]
) -> bool:
    """Return whether an object can be used as a plugin; note a mistake if not."""
    name, cls = plugin_name(type(instance)), type(instance)
    text = ""
    if isinstance(instance, type):
        text = f"{instance.__name__} is a class: give an object of it, {instance.__name__}(...)"
    elif not attrs.has(cls):
        text = f"{instance!r} is no plugin: its class {cls.__name__} is not marked with @plugin"
    elif name in built or name in host.reserved:
        text = f"{instance!r} cannot be added: the name {name!r} is taken"
    if text:
        source.blame(("plugins",), text, "plugin")
    return not text


def _precedes(plugins: Mapping[str, object], one: str, other: str) -> bool:
    mine, theirs = ({name, plugin_name(type(plugins[name]))} for name in (one, other))
    marks = getattr(plugins[one], "before", ()), getattr(plugins[other], "after", ())
    # A setting may have that name; it marks nothing.
    before, after = (mark if isinstance(mark, tuple) else () for mark in marks)
    return not (theirs.isdisjoint(before) and mine.isdisjoint(after))


def _check_hooks(
    host: Host, source: Source, plugins: Mapping[str, Any], brought: Mapping[str, Provenance]
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
        source.blame(("plugins",), text, "hook")


def _claim_tables(source: Source, known: set[str], offered: set[str]) -> None:
    for name, value in source.values.items():
        # A file need not list every plugin of the file that it extends.
        meant = name in offered or (isinstance(value, dict) and "plugin" in value)
        if name in known or (meant and source.origin((name,)).extended):
            continue
        text = f"unknown {'table' if isinstance(value, dict) else 'setting'}{suggest(name, known)}"
        text = "has a table here, but is not in the plugins list" if meant else text
        source.blame((name,), text, "unknown")
