"""What has changed in a run's settings since a checkpoint, and whether it may."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import attrs

from fundamentallm import Period, SettingsError, hook_methods, setting_fields

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from fundamentallm import Run

BUILDS = {"build_data", "build_tokenizer", "build_model", "adapt_model"}
UNSET = "(not set)"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@attrs.frozen
class Change:
    """One setting that is not what it was; ``binds``: a run that goes on with it is another."""

    key: str
    before: str
    after: str
    binds: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.before} → {self.after}"


def record(run: Run) -> dict[str, Any]:
    """Return what a checkpoint keeps of the settings: all, and the keys of those that bind.

    ``run.seed`` binds, and so do all settings of plugins that answer one of ``BUILDS``, but for
    those that the class lists in ``free``; and which class such a plugin has.
    """
    tables = {**run.tables, "plugins": sorted(run.plugins)}
    binding = {"run.seed"}
    for name, instance in run.plugins.items():
        if _builds(instance):
            cls = type(instance)
            tables[name] = tables.get(name, {}) | {"class": f"{cls.__module__}.{cls.__qualname__}"}
            binding |= {f"{name}.{key}" for key in _flat(tables[name]) if not _is_free(cls, key)}
    return {"tables": tables, "binding": sorted(binding)}


def between(before: Mapping[str, Any], run: Run) -> list[Change]:
    """Return what changed since ``before``, a ``record``."""
    now = record(run)
    old, new = _flat(before["tables"]), _flat(now["tables"])
    # A setting that a later version of a plugin has besides means, by default, what was before.
    old = {key: text for key, text in _defaults(run).items() if new.get(key) == text} | old
    gone = {key for key in before["binding"] if key not in new and not _is_freed(run, key)}
    binding = gone.union(now["binding"])
    return [
        Change(key, old.get(key, UNSET), new.get(key, UNSET), key in binding)
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def is_allowed(change: Change, allowed: Collection[str]) -> bool:
    """Tell whether a change is of no harm, or one of those that are made on purpose."""
    return not change.binds or any(fnmatchcase(change.key, pattern) for pattern in allowed)


def check(changes: Collection[Change], allowed: Collection[str], setting: str) -> None:
    """Raise ``SettingsError`` naming every change that may not be; ``setting`` allows some."""
    refused = [change for change in changes if not is_allowed(change, allowed)]
    if refused:
        wanted = json.dumps([*allowed, *(change.key for change in refused)])
        advice = (
            "a run that goes on with this is another one than its checkpoint's: undo it, or start a"
            f" new run. To go on all the same: --set '{setting}={wanted}'"
        )
        raise SettingsError([*map(str, refused), advice])


def _builds(instance: object) -> bool:
    return not BUILDS.isdisjoint(hook for hook, *_ in hook_methods(type(instance)))


def _is_free(cls: type, key: str) -> bool:
    return key.partition(".")[0] in ("plugin", *getattr(cls, "free", ()))


def _is_freed(run: Run, key: str) -> bool:
    name, _, rest = key.partition(".")
    return name in run.plugins and _is_free(type(run.plugins[name]), rest)


def _defaults(run: Run) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, instance in {**run.plugins, "run": run.settings}.items():
        for key, field in setting_fields(type(instance)).items():
            made: Any = field.default
            made = made.factory() if isinstance(made, _FACTORY) else made
            found |= _flat({name: {key: _plain(made)}})
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Period) or not attrs.has(type(value)):
        return value
    return {name: _plain(getattr(value, name)) for name in setting_fields(type(value))}


def _flat(table: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Return the values of nested tables by dotted keys, as JSON."""
    found: dict[str, str] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{above}{name}.")
        elif value is not None:
            text = json.dumps(value, ensure_ascii=False, default=str)
            found[above + name] = _ADDRESS.sub("", text)  # of an object that was given in Python
    return found


_FACTORY: Any = type(attrs.Factory(list))
