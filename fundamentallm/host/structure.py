"""Plain values to the fields of plugins: strict, every mistake at once, each with its place."""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin

import attrs
import cattrs

from fundamentallm.host.declare import setting_fields
from fundamentallm.host.sources import Key, Source

T = TypeVar("T")

_PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path",
}


class Mistakes(Exception):
    """Mistakes in one value, each with the keys that lead to it from there."""

    def __init__(self, *found: tuple[Key, str]) -> None:
        self.found = found


def build(cls: type[T], values: Any, source: Source, key: Key) -> T:
    """Make a plugin or table of the values at ``key``. If it fails, note the mistakes and return
    a blank without settings, whose hooks can be checked all the same."""
    try:
        built = structure(values, cls)
    except Mistakes as mistakes:
        for inner, text in mistakes.found:
            source.blame(key + inner, text)
        return object.__new__(cls)
    for name in values:
        setattr(built, name, _anchored(getattr(built, name), values[name], source, (*key, name)))
    return built


def structure(values: Any, cls: type[T]) -> T:
    """Check a table against the fields of a class and make an instance; raise ``Mistakes``."""
    if not isinstance(values, dict):
        raise Mistakes(((), f"expected a table, got {written(values)}"))
    fields = setting_fields(cls)
    found: list[tuple[Key, str]] = [
        ((name,), f"unknown setting{suggest(name, fields)}")
        for name in values
        if name not in fields
    ]
    kept: dict[str, Any] = {}
    for name, attribute in fields.items():
        if name not in values:
            if attribute.default is attrs.NOTHING:
                found.append(((name,), "is missing, and has no default"))
            continue
        try:
            kept[name] = _structure_field(values[name], attribute)
        except Mistakes as mistakes:
            found += [((name, *inner), text) for inner, text in mistakes.found]
    if not found:
        try:
            return cls(**kept)
        except ValueError as error:
            name, _, text = str(error).partition(": ")
            found.append(((name,), text) if name in fields else ((), str(error)))
    raise Mistakes(*found)


def _structure_field(value: Any, attribute: attrs.Attribute[Any]) -> Any:
    try:
        kept = converter.structure(value, cast("Any", attribute.type))
        if attribute.validator is not None:
            attribute.validator(None, attribute, kept)
    except (ValueError, TypeError, OverflowError) as error:
        # attrs names the field again: once is enough
        raise Mistakes(((), re.sub(r"^'\w+' ", "", str((*error.args, error)[0])))) from None
    return kept


def plain(value: Any) -> Any:
    """Turn settings back into what TOML can hold; fields that are None are left out."""
    if isinstance(value, Path) or _is_parsed(type(value)):
        # What is re-run from elsewhere finds the same.
        return str(value.absolute() if isinstance(value, Path) else value)
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, dict) or attrs.has(type(value)):
        return {str(name): plain(inner) for name, inner in _parts(value) if inner is not None}
    # Of an object that was given to a plugin in Python, a record can only tell what it was.
    return value if isinstance(value, bool | int | float | str) else repr(value)


def walk(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield every value inside the settings of a plugin, with its key."""
    yield key, value
    for name, part in enumerate(value) if isinstance(value, list | tuple) else _parts(value):
        yield from walk(part, (*key, str(name)))


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    if attrs.has(type(value)) and not _is_parsed(type(value)):
        return [(n, getattr(value, n)) for n in setting_fields(type(value)) if hasattr(value, n)]
    return value.items() if isinstance(value, dict) else ()


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)``, or what is known if nothing comes close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(names)})" if 0 < len(names) <= 16 else ""


def written(value: Any) -> str:
    """Write a value as TOML, in one line: which is JSON, but for the sign in inline tables."""
    return json.dumps(value, default=str, ensure_ascii=False, separators=(", ", " = "))


def _structure_plain(value: Any, cls: Any) -> Any:
    accepted = {float: (float, int), Path: (str, Path)}.get(cls, cls)
    if not isinstance(value, accepted) or (isinstance(value, bool) and cls is not bool):
        raise Mistakes(((), f"expected {_PLAIN[cls]}, got {written(value)}"))
    return Path(str(value)).expanduser() if cls is Path else cls(value)


def _structure_literal(value: Any, cls: Any) -> Any:
    allowed = get_args(cls)
    if any(value == choice and type(value) is type(choice) for choice in allowed):
        return value
    raise Mistakes(((), f"unknown value {written(value)}{suggest(str(value), map(str, allowed))}"))


def _structure_union(value: Any, cls: Any) -> Any:
    members = [member for member in get_args(cls) if member is not types.NoneType]
    if value is None and len(members) < len(get_args(cls)):
        return None
    if len(members) == 1:
        return converter.structure(value, members[0])
    meant, got, wishes = None, f", got {written(value)}", list[str]()
    for member in members:
        try:
            return converter.structure(value, member)
        except Mistakes as mistakes:
            key, text = mistakes.found[0]
            if get_origin(member) is Literal:
                wishes += map(written, get_args(member))
            elif key or not text.startswith("expected "):  # of the right form, but wrong inside
                meant = meant or mistakes
            else:
                wishes.append(text.removeprefix("expected ").removesuffix(got))
    raise meant or Mistakes(((), f"expected {' or '.join(wishes)}{got}"))


def _structure_many(value: Any, cls: Any) -> Any:
    wanted, *_, inner = (get_origin(cls), *get_args(cls))
    if not isinstance(value, (list, tuple) if wanted is list else dict):
        what = {list: "list", dict: "table"}[wanted]
        raise Mistakes(((), f"expected a {what}, got {written(value)}"))
    items: dict[Any, Any] = value if isinstance(value, dict) else dict(enumerate(value))
    kept: dict[Any, Any] = {}
    found: list[tuple[Key, str]] = []
    for name, item in items.items():
        try:
            kept[name] = converter.structure(item, inner)
        except Mistakes as mistakes:
            found += [((str(name), *deeper), text) for deeper, text in mistakes.found]
    if found:
        raise Mistakes(*found)
    return kept if wanted is dict else list(kept.values())


def _is_parsed(cls: Any) -> bool:
    """Whether a class reads its values itself: it has a ``parse(value)`` that raises ValueError,
    and ``str()`` of an instance is what it parses to the same."""
    return isinstance(cls, type) and hasattr(cls, "parse")


def _structure_parsed(value: Any, cls: Any) -> Any:
    try:
        return cls.parse(value)
    except ValueError as error:
        raise Mistakes(((), str(error))) from None


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
converter.register_structure_hook_func(attrs.has, structure)
converter.register_structure_hook_func(_is_parsed, _structure_parsed)
