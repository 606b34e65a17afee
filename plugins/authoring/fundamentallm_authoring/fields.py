"""Read the settings of a plugin class, for the schema, the settings file and the docs."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import attrs

from fundamentallm import (
    Period,
    attribute_docs,
    deep_iterable,
    ge,
    in_,
    le,
    optional,
    setting_fields,
)

_KEYWORDS = {">=": "minimum", ">": "exclusiveMinimum", "<=": "maximum", "<": "exclusiveMaximum"}
_SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_NAMES = {bool: "bool", int: "int", float: "float", str: "str", Path: "path", Period: "period"}

# attrs has public functions that make these validators, but their classes are private.
_NUMBER: Any = type(ge(0))
_IN: Any = type(in_([0]))
_OPTIONAL: Any = type(optional(ge(0)))
_EACH: Any = type(deep_iterable(ge(0)))
_AND: Any = type(attrs.validators.and_(ge(0), le(0)))
_MATCHES: Any = type(attrs.validators.matches_re("x"))


@attrs.frozen
class Setting:
    """One setting of a plugin.

    ``default`` is ``attrs.NOTHING`` for a required setting. ``limits`` are the limits that its
    validators check, as JSON Schema keywords.
    """

    name: str
    type: Any
    default: Any
    doc: str
    limits: Mapping[str, Any]
    attribute: attrs.Attribute[Any]

    def accepts(self, value: Any) -> bool:
        """Return whether the setting's validator accepts a value of its type."""
        if self.attribute.validator is None:
            return True
        try:
            self.attribute.validator(None, self.attribute, value)
        except (ValueError, TypeError):
            return False
        return True

    @property
    def required(self) -> bool:
        """Whether every settings file must have this setting."""
        return self.default is attrs.NOTHING


def settings_of(cls: type) -> list[Setting]:
    """Return the settings of a plugin or table class, in the order of their declaration."""
    docs = attribute_docs(cls)
    return [
        Setting(name, a.type, _default(a.default), docs.get(name, ""), _limits(a), a)
        for name, a in setting_fields(cls).items()
    ]


def is_table(annotation: Any) -> bool:
    """Return whether a type is a ``@table`` class. A period is an attrs class, but TOML text."""
    return attrs.has(annotation) and annotation is not Period


def members(annotation: Any) -> list[Any]:
    """Return the types of a union without ``None``, which TOML cannot write; else the type."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for part in get_args(annotation) if part is not type(None)]
    return [annotation]


def limits_of(validator: Any) -> dict[str, Any]:
    """Return the JSON Schema keywords of an attrs validator; {} if there are none for it."""
    if isinstance(validator, _AND):
        parts = attrs.astuple(validator, recurse=False)[0]
        return {key: value for part in parts for key, value in limits_of(part).items()}
    if isinstance(validator, _OPTIONAL):
        return limits_of(validator.validator)
    if isinstance(validator, _EACH):
        whole = limits_of(validator.iterable_validator)
        each = limits_of(validator.member_validator)
        return whole | ({"items": each} if each else {})
    if isinstance(validator, _NUMBER):
        return {_KEYWORDS[validator.compare_op]: validator.bound}
    if isinstance(validator, _IN):
        return {"enum": list(validator.options)}
    return {"pattern": _anchored(validator)} if isinstance(validator, _MATCHES) else {}


def type_words(annotation: Any) -> str:
    """Return a type as text for people: ``int``, ``list of str``, ``"min" or "max"``."""
    words = [_one_type(part) for part in members(annotation)]
    return " or ".join(words)


def limit_words(limits: Mapping[str, Any]) -> str:
    """Return limits as text for people, such as ``≥ 0, < 1``; empty without limits."""
    words = [f"{_SIGNS[key]} {value:g}" for key, value in limits.items() if key in _SIGNS]
    if "enum" in limits:
        words.append("one of " + ", ".join(repr(value) for value in limits["enum"]))
    if "pattern" in limits:
        words.append(f"matches {limits['pattern'][4:-2]}")
    inner = limit_words(limits["items"]) if "items" in limits else ""
    return ", ".join([*words, f"each {inner}"] if inner else words)


def plain(value: Any) -> Any:
    """Return a default as a value that TOML and JSON can write; ``None`` stays ``None``."""
    if isinstance(value, Path | Period):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if attrs.has(type(value)):
        pairs = {name: plain(getattr(value, name)) for name in setting_fields(type(value))}
        return {name: part for name, part in pairs.items() if part is not None}
    return value


def _limits(attribute: attrs.Attribute[Any]) -> dict[str, Any]:
    limits = limits_of(attribute.validator)
    if any(get_origin(part) is Literal for part in members(attribute.type)):
        limits.pop("enum", None)  # the Literal has the same choices
    return limits


def _default(default: Any) -> Any:
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]  # a class at run time
        return attrs.NOTHING if default.takes_self else default.factory()
    return default


def _anchored(validator: Any) -> str:
    # By default attrs matches the whole text; JSON Schema searches within it.
    return f"^(?:{validator.pattern.pattern})$"  # limit_words removes these brackets


def _one_type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(repr(value).replace("'", '"') for value in parts)
    if origin is list:
        return f"list of {type_words(parts[0])}"
    if origin is dict:
        return f"table of {type_words(parts[1])}"
    if is_table(annotation):
        return "table"
    return _NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))
