"""Compare a run's settings with those of a checkpoint, and refuse what makes it another run.

What a plugin does to weights and data decides, by its ``role``: a run whose data, model, optimizer
or way of updating the weights has changed would not end with the same weights. Plugins of other
roles (loggers, validation, samples, averages) may be added, removed and changed.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import attrs

from fundamentallm import SettingsError, flatten, matches, role_of, setting_fields

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from fundamentallm import Run

BINDING_ROLES = {"data", "model", "optimizer", "training"}
UNSET = "(not set)"
LISTED, NOT_LISTED = "listed", "not listed"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@attrs.frozen
class Change:
    """One setting that differs. With ``binds`` the change makes the run another one.

    ``key`` is the path of the setting, or the name of a plugin that was added or removed.
    """

    key: str
    before: str
    after: str
    binds: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.before} → {self.after}"


def record(run: Run) -> dict[str, Any]:
    """Return what a checkpoint stores about the settings: all of them, and the keys that bind.

    These are ``run.seed``, and the name, the class and all settings of every plugin with one of
    ``BINDING_ROLES``, except for the settings that its class lists in ``free``; ``free = ("*",)``
    also lets the plugin be added and removed.
    """
    tables = {**run.tables, "plugins": sorted(run.plugins)}
    binding = {"run.seed"}
    for name, instance in run.plugins.items():
        if role_of(instance) in BINDING_ROLES:
            cls = type(instance)
            # A local file may have another class under the same name.
            tables[name] = tables.get(name, {}) | {"class": f"{cls.__module__}.{cls.__qualname__}"}
            keys = [name, *(f"{name}.{key}" for key in _texts(tables[name]))]
            binding |= {key for key in keys if not _is_free(run, key)}
    return {"tables": tables, "binding": sorted(binding)}


def between(before: Mapping[str, Any], run: Run) -> list[Change]:
    """Return what changed since ``before``, a ``record``: first plugins, then settings."""
    now = record(run)
    was, listed = set(before["tables"]["plugins"]), set(run.plugins)
    # A plugin that was removed binds by the old record only, one that was added by the new one.
    binding = {key for key in before["binding"] if not _is_free(run, key)} | {*now["binding"]}
    found = [
        Change(
            name,
            LISTED if name in was else NOT_LISTED,
            LISTED if name in listed else NOT_LISTED,
            name in binding,
        )
        for name in sorted(was ^ listed)
    ]
    old, new = ({k: v for k, v in one["tables"].items() if k != "plugins"} for one in (before, now))
    for name in was ^ listed:  # one line is enough for all its settings
        old.pop(name, None)
        new.pop(name, None)
    return [*found, *_changed(_texts(old), _texts(new), _defaults(run), binding)]


def is_allowed(change: Change, allowed: Collection[str]) -> bool:
    """Return whether a change keeps the run what it was, or the user allows it."""
    return not change.binds or matches(change.key, allowed)


def check(
    changes: Collection[Change], allowed: Collection[str], setting: str, misfit: str = ""
) -> None:
    """Raise ``SettingsError`` with every change that is refused; ``setting`` would allow it.

    ``misfit`` says why the checkpoint cannot be loaded at all after these changes. Then no setting
    helps, so none is advised.
    """
    if misfit:
        binding = [str(change) for change in changes if change.binds]
        raise SettingsError([*binding, f"{misfit}: undo the changes above, or start a new run"])
    refused = [change for change in changes if not is_allowed(change, allowed)]
    if refused:
        wanted = json.dumps([*allowed, *(change.key for change in refused)])
        advice = (
            "with these changes the run would not be the one that the checkpoint is from: undo"
            f" them, or start a new run. To resume all the same: --set '{setting}={wanted}'"
        )
        raise SettingsError([*map(str, refused), advice])


def _changed(
    old: dict[str, str], new: dict[str, str], defaults: dict[str, str], binding: set[str]
) -> list[Change]:
    # A setting that only a newer version of a plugin has means, by default, what was before.
    old = {key: text for key, text in defaults.items() if new.get(key) == text} | old
    return [
        Change(key, old.get(key, UNSET), new.get(key, UNSET), key in binding)
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _is_free(run: Run, key: str) -> bool:
    """Return whether the class of a listed plugin leaves a key free; one that is gone does not."""
    name, _, rest = key.partition(".")
    if name not in run.plugins:
        return False
    # The key ``plugin`` only chooses the class, and ``record`` has the class itself.
    free = ("plugin", *getattr(type(run.plugins[name]), "free", ()))
    return matches(rest.partition(".")[0], free)


def _defaults(run: Run) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, instance in {**run.plugins, "run": run.settings}.items():
        for key, field in setting_fields(type(instance)).items():
            made: Any = field.default
            made = made.factory() if isinstance(made, _FACTORY) else made
            found |= _texts({name: {key: made}})
    return found


def _texts(tables: Mapping[str, Any]) -> dict[str, str]:
    """Return the values of nested tables by dotted keys, as JSON."""
    return {
        # An object given in Python has another address in every process.
        name: _ADDRESS.sub("", json.dumps(value, ensure_ascii=False, default=str))
        for name, value in flatten(tables).items()
        if value is not None
    }


_FACTORY: Any = type(attrs.Factory(list))
