"""Generate the JSON Schema of settings files, with which editors complete, explain and check.

It is draft 7 without references between tables, which Taplo and Even Better TOML support fully.
The schema accepts everything that the core accepts. Only the core makes four checks: those of
several settings together, validators that are plain functions, numbers such as ``1.0`` in place of
an int (JSON does not distinguish them), and the arithmetic of periods (``"1.5 steps"``).
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

    ``closed``: exactly these plugins are active, and the file may have no other table. Else any
    other table belongs to a second instance of the plugin that its ``plugin = …`` names, or to a
    local plugin.
    """
    tables = {"run": table_schema(RunSettings)}
    tables |= {name: _instance_schema(cls) for name, cls in instances.items()}
    needs = requirements({"run": RunSettings, **instances})
    if not closed:
        # A table is required only if its plugin is listed, which the schema does not check.
        needs["required"] = [name for name in needs.get("required", []) if name == "run"]
    return {
        "$schema": DIALECT,
        "title": "fundamentallm settings",
        "type": "object",
        "properties": _root_keys() | tables,
        "additionalProperties": False if closed else _other_table(instances),
        # The file that it extends may have the required settings.
        "if": {"required": ["extends"]},
        "else": needs,
    }


def table_schema(cls: type) -> dict[str, Any]:
    """Return the schema of the table of a plugin or ``@table`` class, without its required
    settings: see ``requirements``."""
    return {
        "type": "object",
        "description": " ".join((cls.__doc__ or "").split("\n\n")[0].split()),
        "properties": {setting.name: _setting_schema(setting) for setting in settings_of(cls)},
        "additionalProperties": False,
    }


def requirements(tables: Mapping[str, type]) -> dict[str, Any]:
    """Return the keywords for the required settings of a table of these tables.

    A table that has required settings is required itself.
    """
    needs: dict[str, Any] = {}
    for name, cls in tables.items():
        settings = settings_of(cls)
        within = {s.name: _table_of(s.type) for s in settings}
        inner = requirements({key: table for key, table in within.items() if table is not None})
        # A table with a default may be missing as a whole, even if it has required settings.
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
    names = {"type": "string", "description": "Name of the plugin, if the table has another."}
    found["properties"] = {"plugin": names} | found["properties"]
    return found


def _root_keys() -> dict[str, Any]:
    text = {"type": "string"}
    return {
        "extends": text | {"description": "A settings file that this one extends."},
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
