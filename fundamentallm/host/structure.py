"""Plain values to the fields of plugins: strict, every mistake at once, each with its place."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

import attrs
import cattrs

from fundamentallm.host.declare import setting_fields
from fundamentallm.host.mistakes import Key, Mistake, Mistakes, WrongForm, suggest, written
from fundamentallm.host.sources import Source

T = TypeVar("T")

_PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path",
}


def build(cls: type[T], values: Any, source: Source, key: Key) -> T:
    """Make a plugin or table from the values at ``key``.

    If that fails, note the mistakes and return an instance without settings: its hooks can still
    be checked.
    """
    try:
        built = structure(values, cls)
    except Mistakes as mistakes:
        for mistake in mistakes.found:
            source.note(mistake, key)
        return object.__new__(cls)
    for name in values:
        setattr(built, name, _anchored(getattr(built, name), values[name], source, (*key, name)))
    return built


def structure(values: Any, cls: type[T]) -> T:
    """Check a table against the fields of a class and make an instance; raise ``Mistakes``."""
    if not isinstance(values, dict):
        raise Mistakes(Mistake((), "type", "a table", values))
    fields = setting_fields(cls)
    found = [
        Mistake((name,), "unknown", f"unknown setting{suggest(name, fields)}")
        for name in values
        if name not in fields
    ]
    kept: dict[str, Any] = {}
    for name, attribute in fields.items():
        if name not in values:
            if attribute.default is attrs.NOTHING:
                found.append(Mistake((name,), "missing", "is missing, and has no default"))
            continue
        try:
            kept[name] = _structure_field(values[name], attribute)
        except Mistakes as mistakes:
            found += below(name, mistakes)
    if not found:
        try:
            return cls(**kept)
        except ValueError as error:
            # A class that checks several settings together names one of them first.
            name, _, text = str(error).partition(": ")
            key, text = ((name,), text) if name in fields else ((), str(error))
            found.append(Mistake(key, "value", text))
    raise Mistakes(*found)


def _structure_field(value: Any, attribute: attrs.Attribute[Any]) -> Any:
    try:
        kept = converter.structure(value, cast("Any", attribute.type))
    except (ValueError, TypeError, OverflowError) as error:
        raise Mistakes(Mistake((), "value", str((*error.args, error)[0]))) from None
    try:
        check_setting(attribute, kept)
    except ValueError as error:
        raise Mistakes(Mistake((), "value", str(error))) from None
    return kept


def check_setting(attribute: attrs.Attribute[Any], value: Any, plugin: object = None) -> None:
    """Raise ``ValueError`` if the validator of a setting refuses ``value``.

    The text says what is expected, without the name of the setting.
    """
    if attribute.validator is None:
        return
    try:
        attribute.validator(plugin, attribute, value)
    except (ValueError, TypeError, OverflowError) as error:
        # The validators of attrs put the text first, and begin it with the quoted name.
        text = str((*error.args, error)[0]).removeprefix(f"'{attribute.name}' ")
        raise ValueError(text or "its validator refuses the value") from None


def below(name: str, mistakes: Mistakes) -> list[Mistake]:
    """Return the mistakes in a value as those of what holds it under ``name``."""
    return [attrs.evolve(mistake, key=(name, *mistake.key)) for mistake in mistakes.found]


def plain(value: Any) -> Any:
    """Turn settings back into what TOML can hold; fields that are None are left out."""
    if isinstance(value, Path) or _is_parsed(type(value)):
        # What is re-run from elsewhere finds the same.
        return str(value.absolute() if isinstance(value, Path) else value)
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, dict) or attrs.has(type(value)):
        return {str(name): plain(inner) for name, inner in _parts(value) if inner is not None}
    # An object that Python code gave to a plugin can only be described in a record.
    return value if isinstance(value, bool | int | float | str) else repr(value)


def walk(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield every value inside the settings of a plugin, with its key."""
    yield key, value
    for name, part in enumerate(value) if isinstance(value, list | tuple) else _parts(value):
        yield from walk(part, (*key, str(name)))


def flatten(table: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values in nested tables by their dotted names, such as ``gpt.d_model``.

    A table is a dictionary, or an instance of a class of settings such as a plugin.
    """
    found: dict[str, Any] = {}
    for name, value in _parts(table):
        settings = attrs.has(type(value)) and not _is_parsed(type(value))
        if settings or isinstance(value, dict):
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    if attrs.has(type(value)) and not _is_parsed(type(value)):
        return [(n, getattr(value, n)) for n in setting_fields(type(value)) if hasattr(value, n)]
    return value.items() if isinstance(value, dict) else ()


def _structure_plain(value: Any, cls: Any) -> Any:
    accepted = {float: (float, int), Path: (str, Path)}.get(cls, cls)
    # True is an int in Python, but no number in TOML.
    if not isinstance(value, accepted) or (isinstance(value, bool) and cls is not bool):
        raise Mistakes(Mistake((), "type", _PLAIN[cls], value))
    return Path(str(value)).expanduser() if cls is Path else cls(value)


def _structure_literal(value: Any, cls: Any) -> Any:
    allowed = get_args(cls)
    # With the types, since 1 equals True in Python.
    if any(value == choice and type(value) is type(choice) for choice in allowed):
        return value
    text = f"unknown value {written(value)}{suggest(str(value), map(str, allowed))}"
    raise Mistakes(Mistake((), "choice", text))


def _structure_union(value: Any, cls: Any) -> Any:
    members = [member for member in get_args(cls) if member is not types.NoneType]
    if value is None and len(members) < len(get_args(cls)):
        return None
    if len(members) == 1:
        return converter.structure(value, members[0])
    meant, wishes = None, list[str]()
    for member in members:
        try:
            return converter.structure(value, member)
        except Mistakes as mistakes:
            first = mistakes.found[0]
            if get_origin(member) is Literal:
                wishes += map(written, get_args(member))
            elif first.key or first.kind != "type":  # of the right form, but wrong inside
                meant = meant or mistakes
            else:
                wishes.append(first.text)
    raise meant or Mistakes(Mistake((), "type", " or ".join(wishes), value))


def _structure_many(value: Any, cls: Any) -> Any:
    wanted, *_, inner = (get_origin(cls), *get_args(cls))
    if not isinstance(value, (list, tuple) if wanted is list else dict):
        what = {list: "list", dict: "table"}[wanted]
        raise Mistakes(Mistake((), "type", f"a {what}", value))
    items: dict[Any, Any] = value if isinstance(value, dict) else dict(enumerate(value))
    kept: dict[Any, Any] = {}
    found: list[Mistake] = []
    for name, item in items.items():
        try:
            kept[name] = converter.structure(item, inner)
        except Mistakes as mistakes:
            found += below(str(name), mistakes)
    if found:
        raise Mistakes(*found)
    return kept if wanted is dict else list(kept.values())


def _is_parsed(cls: Any) -> bool:
    """Return whether a class reads its values itself, with a ``parse(value)`` that raises
    ``ValueError``; ``parse(str(instance))`` must be equal to the instance."""
    return isinstance(cls, type) and hasattr(cls, "parse")


def _structure_parsed(value: Any, cls: Any) -> Any:
    try:
        return cls.parse(value)
    except WrongForm as error:
        raise Mistakes(Mistake((), "type", error.expected, value)) from None
    except ValueError as error:
        raise Mistakes(Mistake((), "value", str(error))) from None


def _anchored(value: Any, stated: Any, source: Source, key: Key) -> Any:
    """Make the paths in a value absolute, each from where it was stated; defaults were not."""
    if isinstance(value, Path):
        return source.origin(key).folder / value
    if isinstance(value, list):
        return [_anchored(item, stated[n], source, (*key, str(n))) for n, item in enumerate(value)]
    parts = {
        name: _anchored(part, stated[name], source, (*key, name))
        for name, part in _parts(value)
        if name in stated
    }
    return parts if isinstance(value, dict) else attrs.evolve(value, **parts) if parts else value


# Not cattrs' own groups of errors: ``Mistakes`` have the keys that lead to each value.
converter = cattrs.Converter(detailed_validation=False)
for _cls in _PLAIN:
    converter.register_structure_hook(_cls, _structure_plain)
for _hook, *_origins in (
    (_structure_literal, Literal),
    (_structure_many, list, dict),
    (_structure_union, Union, types.UnionType),
):
    _is_one = partial(lambda origins, cls: get_origin(cls) in origins, _origins)
    converter.register_structure_hook_func(_is_one, _hook)
# cattrs asks the last one first: a class that parses its values is not read as a table.
converter.register_structure_hook_func(attrs.has, structure)
converter.register_structure_hook_func(_is_parsed, _structure_parsed)
