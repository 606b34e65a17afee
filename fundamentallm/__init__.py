"""fundamentallm: a training loop that knows the order of events, and plugins for all the rest.

Everything a plugin or a program may use is imported from here. To read the code, begin with
``settings/quickstart.toml`` and go on to ``hookspecs`` (the contract), ``loop``, ``run``,
one plugin, ``defaults``, ``settings``, ``host``, ``launch``, ``folder`` and ``cli``.
"""

# isort: off
from importlib import import_module
from typing import TYPE_CHECKING, Any

from attrs.validators import and_, deep_iterable, ge, gt, in_, le, lt, matches_re, optional
from fundamentallm.host import Found, attribute_docs, choice_options, described, field, plugin
from fundamentallm.host import (
    Provenance,
    check_setting,
    flatten,
    plugin_name,
    setting_fields,
    settings_options,
    state,
    state_fields,
    suggest,
    table,
)

from fundamentallm import folder
from fundamentallm.data import Batch, Cause, Data, Loaded, Progress, Rejection, Tokenizer
from fundamentallm.errors import DataError, FundamentalError, NotFiniteError, OutOfMemoryError
from fundamentallm.errors import PeerError, PluginError, SettingsError, StorageError
from fundamentallm.errors import ran_out_of_memory, why_lost
from fundamentallm.files import durable_file, set_aside, sync_folder, write_durably
from fundamentallm.hookspecs import HOOKS, Hooks, Outcome, about_hook, hookimpl, kind
from fundamentallm.local_code import code_changes
from fundamentallm.names import find_blocks, matches, parameter_names, unmatched
from fundamentallm.periods import Period, round_up
from fundamentallm.process import command_line
from fundamentallm.settings import (
    Composed,
    answering,
    compose,
    find_plugins,
    hook_methods,
    order,
    role_of,
)
from fundamentallm.snapshots import Snapshot
from fundamentallm.run import Run
from fundamentallm.loop import train_window
from fundamentallm.settings import RunSettings

if TYPE_CHECKING:
    from fundamentallm.launch import load_run, recorded, train

__all__ = [
    "HOOKS",
    "Batch",
    "Cause",
    "Composed",
    "Data",
    "DataError",
    "Found",
    "FundamentalError",
    "Hooks",
    "Loaded",
    "NotFiniteError",
    "OutOfMemoryError",
    "Outcome",
    "PeerError",
    "Period",
    "PluginError",
    "Progress",
    "Provenance",
    "Rejection",
    "Run",
    "RunSettings",
    "SettingsError",
    "Snapshot",
    "StorageError",
    "Tokenizer",
    "about_hook",
    "and_",
    "answering",
    "attribute_docs",
    "check_setting",
    "choice_options",
    "code_changes",
    "command_line",
    "compose",
    "deep_iterable",
    "described",
    "durable_file",
    "field",
    "find_blocks",
    "find_plugins",
    "flatten",
    "folder",
    "ge",
    "gt",
    "hook_methods",
    "hookimpl",
    "in_",
    "kind",
    "le",
    "load_run",
    "lt",
    "matches",
    "matches_re",
    "optional",
    "order",
    "parameter_names",
    "plugin",
    "plugin_name",
    "ran_out_of_memory",
    "recorded",
    "role_of",
    "round_up",
    "set_aside",
    "setting_fields",
    "settings_options",
    "state",
    "state_fields",
    "suggest",
    "sync_folder",
    "table",
    "train",
    "train_window",
    "unmatched",
    "why_lost",
    "write_durably",
]


def __getattr__(name: str) -> Any:
    if name in ("train", "load_run", "recorded"):  # torch is imported no earlier than for a run
        return getattr(import_module("fundamentallm.launch"), name)
    raise AttributeError(f"module 'fundamentallm' has no attribute {name!r}")
