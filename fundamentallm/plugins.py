"""Plugins: find them, build them from their tables, check that they fit together, register."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from importlib import metadata
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import attrs
import pluggy
import tomli

from fundamentallm.declare import plugin_name
from fundamentallm.errors import SettingsError
from fundamentallm.hookspecs import HOOKS, REQUIRED, Hooks, kind
from fundamentallm.periods import Period
from fundamentallm.settings import RunSettings, build, plain, suggest, walk, written
from fundamentallm.sources import Source, read

CORE_METRICS = ("train/loss", "train/tokens", "optim/lr", "val/loss")
OURS = tomli.loads(Path(__file__).with_name("first_party.toml").read_text("utf-8"))
RESERVED = ("run", "plugins", "extends", "core")


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
            if renamed and renamed.endswith(".py"):
                renamed = str(self.source.origin((name, "plugin")).folder / renamed)
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
    settings: Path | str | Mapping[str, Any], *, overrides: Iterable[str] = (),
    plugins: Sequence[object] = (), add: Sequence[str] = (), remove: Sequence[str] = (),
) -> Composed:  # fmt: skip
    """Read settings, make the plugins they list, and check that all fits together.

    ``plugins`` are ready instances to use beside the listed ones; ``add`` and ``remove`` change
    the list. Raises ``SettingsError`` with every mistake; nothing is created, no data is read.
    """
    source = read(settings, overrides)
    if source.problems:  # of syntax: anything said beyond them would be a guess
        raise SettingsError(source.problems)
    run = build(RunSettings, source.values.get("run", {}), source, ("run",))
    listed, found = _listed(source, add, remove), find_plugins()
    built, brought = dict[str, Any](), dict[str, str]()
    for name, entry in listed.items():
        cls, brought[name] = _class(source, name, entry, found)
        if cls is not None:
            built[name] = build(cls, _table(source, name), source, (name,))
    for instance in plugins:
        name, brought[name] = _given(source, instance, built)
        built[name] = instance
    _claim_tables(source, {"plugins", "run", *listed, *built, *remove}, found)
    _check_hooks(source, built, brought)
    if listed.keys() <= built.keys():  # what a plugin would answer that was not found is unknown
        source.problems += [f"{hook}: no plugin answers; list one that does"
                            for hook in REQUIRED if hook not in _answers(built)]  # fmt: skip
    _check_values(source, built | {"run": run})
    if source.problems:
        raise SettingsError(source.problems)
    order(built)
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
    pairs = {pair for pair in permutations(plugins, 2) if _precedes(plugins, *pair)}
    done: list[str] = []
    while len(done) < len(plugins):
        left = [name for name in plugins if name not in done]
        ready = [name for name in left if not any((other, name) in pairs for other in left)]
        if not ready:
            raise SettingsError(f"before/after of these plugins run in a circle: {', '.join(left)}")
        done.append(ready[0])
    return done


def hook_methods(cls: type) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield the name, options and function of every method marked as a hook."""
    for name, function in inspect.getmembers(cls, inspect.isroutine):
        if options := getattr(function, "fundamentallm_impl", None):
            yield options.get("specname") or name, options, function


def class_problems(cls: type) -> Iterator[str]:
    """Yield what is wrong with the hooks of one plugin class."""
    methods = {name: method for name, *method in hook_methods(cls)}
    for name in (hook for hook in HOOKS if hasattr(cls, hook) and hook not in methods):
        yield f"method {name} is named like a hook but lacks @hookimpl"
    for name, (options, function) in methods.items():
        if name in HOOKS:
            yield from _method_problems(name, options, function)
        else:
            yield f"there is no hook {name!r}{suggest(name, HOOKS)}"


def _method_problems(name: str, options: Mapping[str, Any], function: Any) -> Iterator[str]:
    if options["wrapper"] and kind(name) != "exclusive":
        yield f"{name} cannot be wrapped: only exclusive hooks can"
    if options["wrapper"] != inspect.isgeneratorfunction(function):
        yield f"{name}: a wrapper, hookimpl(wrapper=True), must yield, and only a wrapper may"
    known = list(inspect.signature(getattr(Hooks, name)).parameters)
    for word, parameter in inspect.signature(function).parameters.items():
        if word not in known:
            yield f"{name} has no argument {word!r}; known: {', '.join(known[1:])}"
        elif parameter.default is not parameter.empty or parameter.kind.name == "KEYWORD_ONLY":
            yield f"{name} would never get {word!r}: take it by position and without default"


def _listed(source: Source, add: Sequence[str], remove: Sequence[str]) -> dict[str, str]:
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
        if name in listed or name in RESERVED:
            source.blame(("plugins",), f"{name!r} is listed twice, or a name of the core's")
        listed[name] = str(folder / entry) if local else entry
    for name in remove:
        if listed.pop(name, None) is None:
            source.blame(("plugins",), f"{name!r} is not listed{suggest(name, listed)}")
    return listed


def _class(source: Source, name: str, entry: str, found: dict[str, Any]) -> tuple[Any, str]:
    """Return the class behind a listed entry and who brings it; note a mistake if none is found."""
    table = source.values.get(name)
    wanted = str(table.get("plugin", entry) if isinstance(table, dict) else entry)
    path = source.origin((name, "plugin")).folder / wanted
    local = [Found(name, str(path), "", partial(_load_file, path))]
    offers = local if wanted.endswith(".py") else found.get(wanted, [])
    if len(offers) != 1:
        text = f"no installed plugin is named {wanted!r}"
        meant = suggest(wanted, {*found, *OURS})
        text += f": pip install {OURS[wanted]}" if wanted in OURS else meant
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


def _load_file(path: Path) -> type:
    name = f"fundamentallm_local_{path.stem}"
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


def _table(source: Source, name: str) -> Any:
    table = source.values.get(name, {})
    return {k: v for k, v in table.items() if k != "plugin"} if isinstance(table, dict) else table


def _given(source: Source, instance: object, built: Mapping[str, object]) -> tuple[str, str]:
    name = plugin_name(type(instance))
    if name in built or name in RESERVED or not attrs.has(type(instance)):
        source.blame(("plugins",), f"{instance!r} is no @plugin object, or {name!r} is taken")
    return name, f"{type(instance).__module__}, given as an object"


def _answers(plugins: Mapping[str, object]) -> dict[str, list[str]]:
    """Return for each hook the names of the plugins that answer it, wrappers aside."""
    answers: dict[str, list[str]] = {}
    for name, instance in plugins.items():
        for hook, options, _ in hook_methods(type(instance)):
            if hook in HOOKS and not options["wrapper"]:
                answers.setdefault(hook, []).append(name)
    return answers


def _precedes(plugins: Mapping[str, object], one: str, other: str) -> bool:
    mine, theirs = ({name, plugin_name(type(plugins[name]))} for name in (one, other))
    before, after = getattr(plugins[one], "before", ()), getattr(plugins[other], "after", ())
    return not (theirs.isdisjoint(before) and mine.isdisjoint(after))


def _check_hooks(source: Source, plugins: Mapping[str, Any], brought: Mapping[str, str]) -> None:
    """Note what is wrong with the plugins' hooks, alone and together."""
    problems = [f"{name} ({brought[name]}): {text}" for name, instance in plugins.items()
                for text in class_problems(type(instance))]  # fmt: skip
    for hook, names in _answers(plugins).items():
        for one, other in combinations(names, 2):
            both = f"{hook}: {one} ({brought[one]}) and {other} ({brought[other]})"
            ordered = _precedes(plugins, one, other) or _precedes(plugins, other, one)
            if kind(hook) == "edit" and not ordered:
                problems += [f"{both} edit the same thing; one class must declare before or after"]
            a, b = plugins[one], plugins[other]
            same = type(a) is type(b) and hook in getattr(a, "speaks_for_all", ())
            if kind(hook) == "exclusive" and not same:
                problems += [f"{both} both answer, but only one can"]
    for text in problems:
        source.blame(("plugins",), text)


def _check_values(source: Source, plugins: Mapping[str, Any]) -> None:
    """Note which settings ask for what the other plugins do not bring: metrics, epochs."""
    produced = [*CORE_METRICS, *(m for p in plugins.values() for m in getattr(p, "produces", ()))]
    data = [plugins[name] for name in _answers(plugins).get("build_data", ())]
    epochs = all(getattr(one, "has_epochs", True) for one in data)
    for key, value in walk(plugins):
        if isinstance(value, Period) and value.unit == "epochs" and not epochs:
            source.blame(key, "the data has no epochs")
    for name, wanted in ((name, getattr(one, "monitor", None)) for name, one in plugins.items()):
        if isinstance(wanted, str) and not any(fnmatchcase(wanted, p) for p in produced):
            text = f"nothing listed produces {wanted!r}{suggest(wanted, produced)}"
            source.blame((name, "monitor"), text)


def _claim_tables(source: Source, known: set[str], found: Iterable[str]) -> None:
    for name, value in source.values.items():
        # What a file takes over from one that it extends need not be in its own list.
        meant = name in {*found, *OURS} or (isinstance(value, dict) and "plugin" in value)
        if name in known or (meant and source.origin((name,)).extended):
            continue
        text = f"unknown {'table' if isinstance(value, dict) else 'setting'}{suggest(name, known)}"
        text = "has a table here, but is not in the plugins list" if meant else text
        source.blame((name,), text)
