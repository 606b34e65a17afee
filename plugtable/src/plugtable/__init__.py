"""Plugins that are attrs classes, listed and configured in TOML, called through pluggy.

An application describes itself once, as a ``Host``: its hooks, its own table, what it checks. From
a TOML file ``compose`` makes the listed plugins, or tells every mistake with its line; ``register``
hands them to pluggy, and ``freeze`` makes plain callables of its hooks. Nothing here knows what the
application does.
"""

from plugtable.composing import Composed, compose, order, register
from plugtable.declare import (
    attribute_docs,
    field,
    get_state,
    plugin,
    plugin_name,
    set_state,
    setting_fields,
    state,
    state_fields,
    table,
)
from plugtable.dispatch import Around, blame, freeze
from plugtable.environment import environment
from plugtable.finding import Found, find
from plugtable.hosts import Host, Kind, class_problems, hook_methods, kind
from plugtable.show import Commands, choice_options, described, settings_options
from plugtable.sources import Key, Origin, Source, read
from plugtable.structure import build, plain, structure, suggest, walk, written

__all__ = [
    "Around", "Commands", "Composed", "Found", "Host", "Key", "Kind", "Origin", "Source",
    "attribute_docs", "blame", "build", "choice_options", "class_problems", "compose",
    "described", "environment", "field", "find", "freeze", "get_state", "hook_methods", "kind",
    "order", "plain", "plugin", "plugin_name", "read", "register", "set_state", "setting_fields",
    "settings_options", "state", "state_fields", "structure", "suggest", "table", "walk",
    "written",
]  # fmt: skip
