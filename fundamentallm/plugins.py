"""Plugins: find them, build them from their tables, check that they fit together, register."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import metadata
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
    entry: metadata.EntryPoint

    def load(self) -> type:
        return self.entry.load()  # type: ignore[no-any-return]


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


class Registry(pluggy.PluginManager):
    """pluggy, with a list of implementations to pass over."""

    def __init__(self, passed_over: set[tuple[int, str]]) -> None:
        super().__init__("fundamentallm")
        self.passed_over = passed_over
        self.add_hookspecs(Hooks)

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        passed = (id(plugin), name) in self.passed_over
        return None if passed else super().parse_hookimpl_opts(plugin, name)


def find_plugins() -> dict[str, list[Found]]:
    """Return the installed plugins by name; more than one under a name is a conflict."""
    found: dict[str, list[Found]] = {}
    for entry in metadata.entry_points(group="fundamentallm"):
        dist = entry.dist
        name, version = (dist.name, dist.version) if dist else ("?", "?")
        found.setdefault(entry.name, []).append(Found(entry.name, name, version, entry))
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
    names = _listed(source, add, remove)
    classes = {name: _class(source, name) for name in names}
    run = build(RunSettings, source.values.get("run", {}), source, ("run",))
    built: dict[str, Any] = {}
    for name, (cls, _) in classes.items():
        if cls is not None:
            table = source.values.get(_instance(name), {})
            values = {k: v for k, v in table.items() if k != "plugin"}
            built[_instance(name)] = build(cls, values, source, (_instance(name),))
    brought = {_instance(name): who for name, (_, who) in classes.items()}
    for instance in plugins:
        name = plugin_name(type(instance))
        if name in built:
            source.blame(("plugins",), f"two instances are named {name!r}: rename one class")
        built[name], brought[name] = instance, f"{type(instance).__module__}, given as an object"
    _claim_tables(source, [*built, *map(_instance, names)], remove)
    kept = {name: instance for name, instance in built.items() if instance is not None}
    if len(kept) == len(names) + len(plugins):
        source.problems += list(_check(kept, brought))
    if run is not None:
        source.problems += _check_run(run, kept, source)
    if source.problems or run is None:
        raise SettingsError(source.problems)
    source.values["plugins"] = names
    return Composed(run, kept, source, brought)


def register(composed: Composed, defaults: Mapping[str, Any]) -> Registry:
    """Register the plugins, so that they are called in list order, and the defaults they need."""
    answers = _answers(composed.plugins)
    passed_over = {(id(composed.plugins[name]), hook) for hook, names in answers.items()
                   if kind(hook) == "exclusive" for name in sorted(names)[1:]}  # fmt: skip
    registry = Registry(passed_over)
    core = {hook: answer for hook, answer in defaults.items() if not answers.get(hook)}
    registry.register(type("Defaults", (), {h: staticmethod(a) for h, a in core.items()}), "core")
    for name in reversed(order(composed.plugins)):  # pluggy calls the last one registered first
        registry.register(composed.plugins[name], name)
    return registry


def order(plugins: Mapping[str, object]) -> list[str]:
    """Return the names in list order, moved only as far as ``before``/``after`` demand."""
    first = {name: {other for other in plugins if _precedes(plugins[other], plugins[name])}
             for name in plugins}  # fmt: skip
    done: list[str] = []
    while len(done) < len(plugins):
        ready = [name for name in plugins if name not in done and first[name] <= set(done)]
        if not ready:
            circle = ", ".join(name for name in plugins if name not in done)
            raise SettingsError(f"before/after of these plugins contradict each other: {circle}")
        done.append(ready[0])
    return done


def _listed(source: Source, add: Sequence[str], remove: Sequence[str]) -> list[str]:
    names = source.values.get("plugins", [])
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        source.blame(("plugins",), "expected a list of plugin names")
        return []
    names = [*names, *add]
    for name in remove:
        if name not in map(_instance, names):
            source.blame(("plugins",), f"{name!r} is not listed{suggest(name, names)}")
    for name in {name for name in names if [*map(_instance, names)].count(_instance(name)) > 1}:
        source.blame(("plugins",), f"{_instance(name)!r} is listed twice")
    return [name for name in dict.fromkeys(names) if _instance(name) not in remove]


def _instance(listed: str) -> str:
    return Path(listed).stem if listed.endswith(".py") else listed


def _class(source: Source, listed: str) -> tuple[type | None, str]:
    """Return the class behind a listed name and who brings it; note a mistake if there is none."""
    if listed.endswith(".py"):
        return _local_class(source, source.origin(("plugins",)).folder / listed)
    table = source.values.get(listed)
    wanted = table.get("plugin", listed) if isinstance(table, dict) else listed
    key = (listed, "plugin") if wanted != listed else ("plugins",)
    found = find_plugins()
    offers = found.get(wanted, [])
    if len(offers) == 1:
        return offers[0].load(), f"{offers[0].distribution} {offers[0].version}"
    if offers:
        names = " and ".join(sorted(offer.distribution for offer in offers))
        source.blame(key, f"plugin {wanted!r} is offered by {names}: uninstall one of them")
        return None, ""
    ours = tomli.loads((Path(__file__).parent / "first_party.toml").read_text())
    advice = f": pip install {ours[wanted]}" if wanted in ours else suggest(wanted, [*found, *ours])
    source.blame(key, f"no installed plugin is named {wanted!r}{advice}")
    return None, ""


def _local_class(source: Source, path: Path) -> tuple[type | None, str]:
    spec = importlib.util.spec_from_file_location(f"fundamentallm_local_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        source.blame(("plugins",), f"no such file: {path}")
        return None, ""
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # noqa: BLE001 - whatever a user's file raises
        source.blame(("plugins",), f"{path} fails to load: {error!r}")
        return None, ""
    classes = [c for c in vars(module).values() if inspect.isclass(c) and attrs.has(c)
               and c.__module__ == spec.name and any(hook_methods(c))]  # fmt: skip
    chosen = [c for c in classes if plugin_name(c) == path.stem] or classes
    if len(chosen) != 1:
        source.blame(("plugins",), f"{path} has {len(classes)} plugin classes; name one after it")
        return None, ""
    return chosen[0], str(path)


def hook_methods(cls: type) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield the name, options and function of every method marked as a hook."""
    for name, function in inspect.getmembers(cls, inspect.isroutine):
        options = getattr(function, "fundamentallm_impl", None)
        if options is not None:
            yield options.get("specname") or name, options, function


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


def _check(plugins: Mapping[str, Any], brought: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with the plugins, alone and together."""
    for name, instance in plugins.items():
        for text in class_problems(type(instance)):
            yield f"plugin {name!r} ({brought[name]}): {text}"
    who = {name: f"{name!r} ({brought[name]})" for name in plugins}
    answers = _answers(plugins)
    for hook, names in answers.items():
        if kind(hook) == "exclusive" and len(names) > 1:
            classes = {type(plugins[name]) for name in names}
            if len(classes) > 1 or hook not in getattr(classes.pop(), "speaks_for_all", ()):
                yield f"{hook}: only one plugin can answer, but {' and '.join(who[n] for n in names)} do"
        if kind(hook) == "edit":
            yield from _unordered(hook, {name: plugins[name] for name in names}, plugins)
    for hook in REQUIRED:
        if hook not in answers:
            yield f"{hook}: no listed plugin answers it; list one that does"
    produced = [*CORE_METRICS, *(m for p in plugins.values() for m in getattr(p, "produces", ()))]
    for name, instance in plugins.items():
        wanted = getattr(instance, "monitor", None)
        if isinstance(wanted, str) and not any(fnmatchcase(wanted, p) for p in produced):
            yield f"{name}.monitor: nothing listed produces {wanted!r}{suggest(wanted, produced)}"


def class_problems(cls: type) -> Iterator[str]:
    """Yield what is wrong with the hooks of one plugin class."""
    for name, options, function in hook_methods(cls):
        if name not in HOOKS:
            yield f"there is no hook {name!r}{suggest(name, HOOKS)}"
            continue
        known = set(inspect.signature(getattr(Hooks, name)).parameters)
        unknown = set(inspect.signature(function).parameters) - known
        if unknown:
            yield f"{name} has no argument {', '.join(sorted(unknown))}; known: {', '.join(known)}"
        if options["wrapper"] and kind(name) != "exclusive":
            yield f"{name} cannot be wrapped: only exclusive hooks can"
    for name in HOOKS:
        if callable(getattr(cls, name, None)) and name not in {n for n, _, _ in hook_methods(cls)}:
            yield f"method {name} is named like a hook but lacks @hookimpl"


def _unordered(hook: str, editors: dict[str, Any], plugins: Mapping[str, Any]) -> Iterator[str]:
    """Yield the pairs of editors that no chain of before/after orders."""
    reach = {a: {b for b in plugins if _precedes(plugins[a], plugins[b])} for a in plugins}
    for middle in plugins:
        for name in plugins:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    names = list(editors)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if other not in reach[one] and one not in reach[other]:
                yield (f"{hook}: {one!r} and {other!r} both edit it; one of their classes must "
                       f"declare before = (...) or after = (...) with the other's name")  # fmt: skip


def _check_run(run: RunSettings, plugins: Mapping[str, Any], source: Source) -> list[str]:
    """Tell which periods are in epochs though the data has none."""
    data = [p for p in plugins.values() if "build_data" in dict.fromkeys(h for h, _, _ in hook_methods(type(p)))]
    if not data or getattr(data[0], "has_epochs", True):
        return []
    found = (((name, *key), v) for name, i in {"run": run, **plugins}.items() for key, v in walk(i))
    return [f"{source.origin(key).place}: {'.'.join(key)}: the data source has no epochs"
            for key, v in found if isinstance(v, Period) and v.unit == "epochs"]  # fmt: skip


def _claim_tables(source: Source, names: Sequence[str], removed: Sequence[str]) -> None:
    for name, value in source.values.items():
        if name in ("plugins", "run", *names, *removed) or source.origin((name,)).extended:
            continue
        if isinstance(value, dict) and name in find_plugins():
            source.blame((name,), "this plugin has a table but is not in the plugins list")
        else:
            what = "table" if isinstance(value, dict) else "setting"
            source.blame((name,), f"unknown {what}{suggest(name, ['plugins', 'run', *names])}")
