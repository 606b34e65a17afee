"""JSON Schema for settings files, so that editors complete, explain and check them.

Draft 7, without references between the tables: what Taplo and Even Better TOML follow surely.
Whatever the core accepts, the schema accepts. The other way round four things are left to the core:
checks between several settings, validators that are plain functions, numbers like ``1.0`` where an
int is wanted (JSON knows no difference), and what only arithmetic tells of a period.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from fundamentallm import Period, RunSettings
from fundamentallm_authoring.fields import is_table, members, plain, settings_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fundamentallm_authoring.fields import Setting

DIALECT = "http://json-schema.org/draft-07/schema#"

_PLAIN = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    Path: {"type": "string"},
    Any: {},
}
_PERIOD = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {
            "type": "string",
            "pattern": r"^\s*(?=[0_.]*[1-9])[0-9][0-9_]*(\.[0-9]+)?([eE][+]?[0-9]+)?\s*"
            r"(step|epoch|token|second|minute|hour)s?\s*$",
        },
    ]
}


def settings_schema(instances: Mapping[str, type], *, closed: bool) -> dict[str, Any]:
    """Return the schema of settings files with these plugins, by instance name.

    ``closed``: exactly these plugins are active, and no other table may stand there. Else a table
    that no plugin is named after is taken for a second instance of the plugin that its
    ``plugin = …`` names, or for a local plugin's.
    """
    tables = {"run": table_schema(RunSettings)}
    tables |= {name: _instance_schema(cls) for name, cls in instances.items()}
    needs = requirements({"run": RunSettings, **instances})
    if not closed:
        # Whether a plugin is active, and so has to have its table, only the list tells.
        needs["required"] = [name for name in needs.get("required", []) if name == "run"]
    return {
        "$schema": DIALECT,
        "title": "fundamentallm settings",
        "type": "object",
        "properties": _root_keys() | tables,
        "additionalProperties": False if closed else _other_table(instances),
        # A file that extends another may find there what a table must hold.
        "if": {"required": ["extends"]},
        "else": needs,
    }


def table_schema(cls: type) -> dict[str, Any]:
    """Return the schema of the table that a plugin or ``@table`` class describes, apart from what
    it has to hold: see ``requirements``."""
    return {
        "type": "object",
        "description": " ".join((cls.__doc__ or "").split("\n\n")[0].split()),
        "properties": {setting.name: _setting_schema(setting) for setting in settings_of(cls)},
        "additionalProperties": False,
    }


def requirements(tables: Mapping[str, type]) -> dict[str, Any]:
    """Return the keywords that demand, of a table that holds these tables, all that has no
    default: the settings, and the tables that hold such settings."""
    needs: dict[str, Any] = {}
    for name, cls in tables.items():
        settings = settings_of(cls)
        within = {s.name: _table_of(s.type) for s in settings}
        inner = requirements({key: table for key, table in within.items() if table is not None})
        # A table with a default may be left out as a whole, whatever it holds otherwise.
        inner["required"] = [s.name for s in settings if s.required]
        if inner["required"] or "properties" in inner:
            needs.setdefault("properties", {})[name] = inner
        if inner["required"]:
            needs.setdefault("required", []).append(name)
    return needs


def type_schema(annotation: Any) -> dict[str, Any]:
    """Return the schema of one type of a setting."""
    several = members(annotation)
    if len(several) > 1:
        return {"anyOf": [type_schema(part) for part in several]}
    return _one_type(several[0])


def _one_type(annotation: Any) -> dict[str, Any]:
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is Period:
        return dict(_PERIOD)
    if origin is Literal:
        return {"enum": list(parts)}
    if origin is list:
        return {"type": "array", "items": _item_schema(parts[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": type_schema(parts[1])}
    return table_schema(annotation) if is_table(annotation) else dict(_PLAIN[annotation])


def _table_of(annotation: Any) -> type | None:
    tables = [part for part in members(annotation) if is_table(part)]
    return tables[0] if len(tables) == 1 else None


def _item_schema(annotation: Any) -> dict[str, Any]:
    # Lists replace each other as a whole: their tables are complete in every file.
    needed = [s.name for s in settings_of(annotation) if s.required] if is_table(annotation) else []
    return type_schema(annotation) | ({"required": needed} if needed else {})


def _setting_schema(setting: Setting) -> dict[str, Any]:
    found = type_schema(setting.type)
    limits = dict(setting.limits)
    if "items" in limits:
        found["items"] = found.get("items", {}) | limits.pop("items")
    found |= limits
    if setting.doc:
        found["description"] = setting.doc
    default = None if setting.required else plain(setting.default)
    return found if default is None else found | {"default": default}


def _instance_schema(cls: type) -> dict[str, Any]:
    found = table_schema(cls)
    names = {"type": "string", "description": "The plugin, where the table's name is not its name."}
    found["properties"] = {"plugin": names} | found["properties"]
    return found


def _root_keys() -> dict[str, Any]:
    text = {"type": "string"}
    return {
        "extends": text | {"description": "A settings file that this one changes and adds to."},
        "plugins": {
            "type": "array",
            "items": text,
            "description": "The active plugins: names of installed ones, or paths of .py files.",
        },
    }


def _other_table(instances: Mapping[str, type]) -> dict[str, Any]:
    cases = [
        {
            "if": {"properties": {"plugin": {"const": name}}, "required": ["plugin"]},
            "then": _instance_schema(cls),
        }
        for name, cls in instances.items()
    ]
    return {"type": "object", "allOf": cases} if cases else {"type": "object"}
