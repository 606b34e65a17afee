"""Plugins: find them, build them from their tables, check that they fit together, register."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any

import attrs
import pluggy
import tomli

from fundamentallm.declare import plugin_name
from fundamentallm.errors import SettingsError
from fundamentallm.hookspecs import HOOKS, REQUIRED, Hooks, kind
from fundamentallm.periods import Period
from fundamentallm.settings import RunSettings, build, plain, suggest, walk
from fundamentallm.sources import Source, read

CORE_METRICS = ("train/loss", "train/tokens", "optim/lr", "val/loss")


@attrs.frozen
class Found:
    """An installed plugin: its entry point, loaded only when asked."""

    name: str
    distribution: str
    version: str
    load: Any


@attrs.define
class Composed:
    """Checked settings: the ``[run]`` table and the plugins by instance name, in list order."""

    run: RunSettings
    plugins: dict[str, Any]
    source: Source
    brought: dict[str, str]
    """Instance name -> who brings its class: ``fundamentallm-gpt 0.1.0`` or a file."""

    @property
    def tables(self) -> dict[str, Any]:
        """All settings, defaults included, as the TOML that composes to the same again."""
        tables = {"plugins": list(self.source.values["plugins"]), "run": plain(self.run)}
        for name, instance in self.plugins.items():
            renamed = self.source.values.get(name, {}).get("plugin")
            tables[name] = ({"plugin": renamed} if renamed else {}) | plain(instance)
        return tables


def find_plugins() -> dict[str, list[Found]]:
    """Return the installed plugins by name; more than one under a name is a conflict."""
    found: dict[str, list[Found]] = {}
    for entry in metadata.entry_points(group="fundamentallm"):
        by, version = (entry.dist.name, entry.dist.version) if entry.dist else ("?", "?")
        found.setdefault(entry.name, []).append(Found(entry.name, by, version, entry.load))
    return dict(sorted(found.items()))


def compose(
    settings: Path | str | Mapping[str, Any],
    *,
    overrides: Iterable[str] = (),
    plugins: Sequence[object] = (),
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
) -> Composed:
    """Read settings, make the plugins they list, and check that all fits together.

    ``plugins`` are ready instances to use beside the listed ones; ``add`` and ``remove`` change
    the list. Raises ``SettingsError`` with every mistake; nothing is created, no data is read.
    """
    source = read(settings, overrides)
    if source.problems:  # of syntax: anything said beyond them would be a guess
        raise SettingsError(source.problems)
    listed = _listed(source, add, remove)
    run = build(RunSettings, source.values.get("run", {}), source, ("run",))
    built: dict[str, Any] = {}
    brought: dict[str, str] = {}
    for name, entry in listed.items():
        cls, brought[name] = _class(source, name, entry)
        table = source.values.get(name, {})
        if isinstance(table, dict):
            table = {key: value for key, value in table.items() if key != "plugin"}
        built[name] = cls and build(cls, table, source, (name,))
    for instance in plugins:
        name = plugin_name(type(instance))
        if name in built:
            source.blame(("plugins",), f"two plugins are named {name!r}: rename one class")
        built[name], brought[name] = instance, f"{type(instance).__module__}, given as an object"
    _claim_tables(source, built, remove)
    if None not in built.values():
        source.problems += _fit(built, brought)
        source.problems += _epochs(built | {"run": run}, source)
    if source.problems or run is None:
        raise SettingsError(source.problems)
    source.values["plugins"] = list(listed.values())
    return Composed(run, built, source, brought)


def register(composed: Composed, defaults: Mapping[str, Any]) -> pluggy.PluginManager:
    """Register the plugins, so that they are called in list order, and the defaults they need."""
    registry = pluggy.PluginManager("fundamentallm")
    registry.add_hookspecs(Hooks)
    answers = _answers(composed.plugins)
    core = {hook: staticmethod(answer) for hook, answer in defaults.items() if hook not in answers}
    registry.register(type("Defaults", (), core), "core")
    for name in reversed(order(composed.plugins)):  # pluggy calls the last one registered first
        registry.register(composed.plugins[name], name)
    return registry


def order(plugins: Mapping[str, object]) -> list[str]:
    """Return the names in list order, moved only as far as ``before``/``after`` demand."""
    done: list[str] = []
    while len(done) < len(plugins):
        left = [name for name in plugins if name not in done]
        ready = [n for n in left if not any(_precedes(plugins[o], plugins[n]) for o in left)]
        if not ready:
            raise SettingsError(f"before/after of these plugins run in a circle: {', '.join(left)}")
        done.append(ready[0])
    return done


def hook_methods(cls: type) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield the name, options and function of every method marked as a hook."""
    for name, function in inspect.getmembers(cls, inspect.isroutine):
        options = getattr(function, "fundamentallm_impl", None)
        if options is not None:
            yield options.get("specname") or name, options, function


def class_problems(cls: type) -> Iterator[str]:
    """Yield what is wrong with the hooks of one plugin class."""
    for name, options, function in hook_methods(cls):
        if name not in HOOKS:
            yield f"there is no hook {name!r}{suggest(name, HOOKS)}"
            continue
        known = inspect.signature(getattr(Hooks, name)).parameters
        for word in inspect.signature(function).parameters.keys() - known:
            yield f"{name} has no argument {word!r}; known: {', '.join(list(known)[1:])}"
        if options["wrapper"] and kind(name) != "exclusive":
            yield f"{name} cannot be wrapped: only exclusive hooks can"
    for name in set(HOOKS) & set(dir(cls)) - {name for name, _, _ in hook_methods(cls)}:
        yield f"method {name} is named like a hook but lacks @hookimpl"


def _listed(source: Source, add: Sequence[str], remove: Sequence[str]) -> dict[str, str]:
    """Return the listed entries by instance name: a local file's is its stem."""
    entries = source.values.get("plugins", [])
    if not isinstance(entries, list | tuple) or not all(isinstance(e, str) for e in entries):
        source.blame(("plugins",), "expected a list of plugin names")
        return {}
    listed: dict[str, str] = {}
    for entry in [*entries, *add]:
        name = Path(entry).stem if entry.endswith(".py") else entry
        if name in listed:
            source.blame(("plugins",), f"{name!r} is listed twice")
        listed[name] = entry
    for name in remove:
        if listed.pop(name, None) is None:
            source.blame(("plugins",), f"{name!r} is not listed{suggest(name, listed)}")
    return listed


def _class(source: Source, name: str, entry: str) -> tuple[type | None, str]:
    """Return the class behind a listed entry and who brings it; note a mistake if none is found."""
    if entry.endswith(".py"):
        return _local_class(source, source.origin(("plugins",)).folder / entry)
    table = source.values.get(name)
    wanted = table.get("plugin", name) if isinstance(table, dict) else name
    found = find_plugins()
    offers = found.get(wanted, [])
    if len(offers) == 1:
        who = f"{offers[0].distribution} {offers[0].version}"
        return _loaded(source, offers[0].load, f"plugin {wanted!r} ({who})"), who
    ours = tomli.loads(Path(__file__).with_name("first_party.toml").read_text("utf-8"))
    text = f"no installed plugin is named {wanted!r}"
    text += f": pip install {ours[wanted]}" if wanted in ours else suggest(wanted, [*found, *ours])
    if offers:
        text = f"plugin {wanted!r} is offered by {' and '.join(o.distribution for o in offers)}"
    source.blame((name, "plugin") if wanted != name else ("plugins",), text)
    return None, ""


def _local_class(source: Source, path: Path) -> tuple[type | None, str]:
    name = f"fundamentallm_local_{path.stem}"

    def load() -> type:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[name] = module  # where attrs looks for the types that annotations name
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        classes = [c for c in vars(module).values() if isinstance(c, type)
                   and c.__module__ == name and any(hook_methods(c))]  # fmt: skip
        chosen = [c for c in classes if plugin_name(c) == path.stem] or classes
        if len(chosen) != 1:
            raise ValueError(f"it has {len(classes)} plugins, and none named like the file")
        return chosen[0]

    return _loaded(source, load, str(path)), str(path)


def _loaded(source: Source, load: Callable[[], type], what: str) -> type | None:
    try:
        return load()
    except Exception as error:  # noqa: BLE001 - whatever somebody's module raises
        source.blame(("plugins",), f"{what} cannot be loaded: {error}")
        return None


def _answers(plugins: Mapping[str, object]) -> dict[str, list[str]]:
    """Return for each hook the names of the plugins that answer it, wrappers aside."""
    answers: dict[str, list[str]] = {}
    for name, instance in plugins.items():
        for hook, options, _ in hook_methods(type(instance)):
            if not options["wrapper"]:
                answers.setdefault(hook, []).append(name)
    return answers


def _precedes(one: object, other: object) -> bool:
    mine, theirs = plugin_name(type(one)), plugin_name(type(other))
    return theirs in getattr(one, "before", ()) or mine in getattr(other, "after", ())


def _fit(plugins: Mapping[str, Any], brought: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with the plugins, alone and together."""
    for name, instance in plugins.items():
        yield from (f"{name} ({brought[name]}): {text}" for text in class_problems(type(instance)))
    answers = _answers(plugins)
    for hook, names in answers.items():
        for one, other in combinations(names, 2):
            both = f"{hook}: {one} ({brought[one]}) and {other} ({brought[other]})"
            a, b = plugins[one], plugins[other]
            if kind(hook) == "edit" and not (_precedes(a, b) or _precedes(b, a)):
                yield f"{both} edit the same thing; declare before or after in one of the classes"
            same = type(a) is type(b) and hook in getattr(a, "speaks_for_all", ())
            if kind(hook) == "exclusive" and not same:
                yield f"{both} both answer, but only one can"
    yield from (f"{h}: no plugin answers; list one that does" for h in REQUIRED if h not in answers)
    produced = [*CORE_METRICS, *(m for p in plugins.values() for m in getattr(p, "produces", ()))]
    for name, instance in plugins.items():
        wanted = getattr(instance, "monitor", None)
        if isinstance(wanted, str) and not any(fnmatchcase(wanted, p) for p in produced):
            yield f"{name}.monitor: nothing listed produces {wanted!r}{suggest(wanted, produced)}"


def _epochs(plugins: Mapping[str, Any], source: Source) -> Iterator[str]:
    """Yield which periods are in epochs though the data has none."""
    data = [plugins[name] for name in _answers(plugins).get("build_data", ())]
    if data and not getattr(data[0], "has_epochs", True):
        for name, instance in plugins.items():
            for key, value in walk(instance, (name,)):
                if isinstance(value, Period) and value.unit == "epochs":
                    yield f"{source.origin(key).place}: {'.'.join(key)}: the data has no epochs"


def _claim_tables(source: Source, built: Iterable[str], removed: Iterable[str]) -> None:
    known = {"plugins", "run", *built, *removed}
    for name, value in source.values.items():
        # What a file takes over from one that it extends need not be in its own list.
        if name in known or source.origin((name,)).extended:
            continue
        text = f"unknown {'table' if isinstance(value, dict) else 'setting'}{suggest(name, known)}"
        here = name in find_plugins()
        source.blame((name,), "has a table here, but is not in the plugins list" if here else text)
