"""Plugins that are attrs classes, listed and configured in TOML, called through pluggy.

An application describes itself once, as a ``Host``: its hooks, its own table, its checks.
``compose`` makes the plugins that a TOML file lists, or reports every mistake with its line.
``register`` adds them to pluggy, and ``freeze`` turns pluggy's hooks into plain callables. Nothing
here depends on what the application does.
"""

from fundamentallm.host.cli import Commands, choice_options, described, settings_options
from fundamentallm.host.compose import Composed, compose, order, register
from fundamentallm.host.declare import (
    attribute_docs,
    field,
    get_state,
    plugin,
    plugin_name,
    renew,
    set_state,
    setting_fields,
    state,
    state_fields,
    table,
)
from fundamentallm.host.discover import Found, find
from fundamentallm.host.dispatch import FirstCall, Shared, blame, freeze
from fundamentallm.host.environment import environment
from fundamentallm.host.host import Host, Known, answering, class_problems, hook_methods, role_of
from fundamentallm.host.mistakes import Key, Mistake, WrongForm, closest, suggest, written
from fundamentallm.host.sources import Provenance, Source, read
from fundamentallm.host.specs import Deprecated, HookFacts, Kind, hook_facts, markers
from fundamentallm.host.structure import build, check_setting, flatten, plain, structure, walk

__all__ = [
    "Commands",
    "Composed",
    "Deprecated",
    "FirstCall",
    "Found",
    "HookFacts",
    "Host",
    "Key",
    "Kind",
    "Known",
    "Mistake",
    "Provenance",
    "Shared",
    "Source",
    "WrongForm",
    "answering",
    "attribute_docs",
    "blame",
    "build",
    "check_setting",
    "choice_options",
    "class_problems",
    "closest",
    "compose",
    "described",
    "environment",
    "field",
    "find",
    "flatten",
    "freeze",
    "get_state",
    "hook_facts",
    "hook_methods",
    "markers",
    "order",
    "plain",
    "plugin",
    "plugin_name",
    "read",
    "register",
    "renew",
    "role_of",
    "set_state",
    "setting_fields",
    "settings_options",
    "state",
    "state_fields",
    "structure",
    "suggest",
    "table",
    "walk",
    "written",
]
