"""Plain values to the fields of plugins: strict, every mistake at once, each with its place."""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import attrs
import cattrs

from fundamentallm.declare import plugin, setting_fields
from fundamentallm.periods import Period
from fundamentallm.sources import Key, Source

T = TypeVar("T")

_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((float, int), "a number"),
    str: ((str,), "a string"),
    Path: ((str, Path), "a path"),
}


@plugin
class RunSettings:
    """The ``[run]`` table: what the loop itself needs to know."""

    length: Period
    """How long to train: a period such as "2000 steps", "3 epochs", "1e9 tokens", "2 hours"."""
    validate_every: Period | None = None
    """How often to validate; the last step is validated in any case, if there is held-out data."""
    log_every: Period = Period(50)
    """How often metrics become numbers and go to the loggers: the mean since the last time."""
    seed: int = attrs.field(default=1337, validator=attrs.validators.ge(0))
    """The one seed: initial weights, data order, dropout and samples all derive from it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; "auto" takes the GPU if there is one."""
    name: str | None = attrs.field(
        default=None,
        validator=attrs.validators.optional(attrs.validators.matches_re(r"[A-Za-z0-9][\w.+-]*")),
    )
    """The run's name, and its folder's; by default that of the settings file."""
    folder: Path = Path("runs")
    """The folder that run folders are made in, relative to where the command is run."""


class Mistakes(ValueError):
    """Mistakes in one value, each with the keys that lead to it from there."""

    def __init__(self, found: list[tuple[Key, str]]) -> None:
        self.found = found
        super().__init__("; ".join(f"{'.'.join(key)}: {text}" for key, text in found))


def build(cls: type[T], values: Any, source: Source, key: Key) -> T | None:
    """Make a plugin or table of the values at ``key``; None, and noted mistakes, if it fails."""
    try:
        found = structure(values, cls)
    except Mistakes as mistakes:
        for inner, text in mistakes.found:
            source.blame(key + inner, text)
        return None
    _anchor(found, source, key)
    return found


def structure(values: Any, cls: type[T]) -> T:
    """Check a table against the fields of a class and make an instance; raise ``Mistakes``."""
    if not isinstance(values, dict):
        raise Mistakes([((), f"expected a table, got {show_value(values)}")])
    fields = setting_fields(cls)
    found = [((name,), "unknown setting" + suggest(name, fields))
             for name in values if name not in fields]  # fmt: skip
    kept: dict[str, Any] = {}
    for name, attribute in fields.items():
        if name not in values:
            if attribute.default is attrs.NOTHING:
                found.append(((name,), "is missing, and has no default"))
            continue
        try:
            kept[name] = converter.structure(values[name], attribute.type)
            if attribute.validator is not None:
                attribute.validator(None, attribute, kept[name])
        except Exception as error:  # noqa: BLE001 - whatever it is, it says what is wrong
            found += [((name, *inner), text) for inner, text in _flatten(error)]
    if not found:
        try:
            return cls(**kept)
        except ValueError as error:
            name, colon, text = str(error).partition(": ")
            named = colon and name in fields
            found.append(((name,), text) if named else ((), str(error)))
    raise Mistakes(found)


def plain(value: Any) -> Any:
    """Turn settings back into what TOML can hold; fields that are None are left out."""
    if attrs.has(type(value)) and not isinstance(value, Period):
        pairs = ((name, getattr(value, name)) for name in setting_fields(type(value)))
        return {name: plain(inner) for name, inner in pairs if inner is not None}
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Period | Path) else value


def walk(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield every value inside the settings of a plugin, with its key."""
    yield key, value
    inner: Iterable[tuple[Any, Any]] = ()
    if attrs.has(type(value)) and not isinstance(value, Period):
        inner = ((name, getattr(value, name)) for name in setting_fields(type(value)))
    elif isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    for name, part in inner:
        yield from walk(part, (*key, str(name)))


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)``, or what is known if nothing comes close."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(sorted(names))})" if 0 < len(names) <= 12 else ""


def show_value(value: Any) -> str:
    """Write a value the way TOML would."""
    return json.dumps(value, default=str)


def _flatten(error: BaseException) -> Iterator[tuple[Key, str]]:
    if isinstance(error, Mistakes):
        yield from error.found
    elif isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _flatten(inner)
    else:
        # attrs names the field once more, and hands over the rest of its facts as arguments.
        yield (), re.sub(r"^'\w+' ", "", str(error.args[0] if error.args else error))


def _structure_plain(value: Any, cls: Any) -> Any:
    types_, name = _PLAIN[cls]
    if not isinstance(value, types_) or (isinstance(value, bool) and cls is not bool):
        raise Mistakes([((), f"expected {name}, got {show_value(value)}")])
    return Path(value).expanduser() if cls is Path else cls(value)


def _structure_literal(value: Any, cls: Any) -> Any:
    allowed = get_args(cls)
    if any(value == choice and type(value) is type(choice) for choice in allowed):
        return value
    names = [str(choice) for choice in allowed]
    hint = suggest(value, names) if isinstance(value, str) else f" (known: {', '.join(names)})"
    raise Mistakes([((), f"unknown value {show_value(value)}{hint}")])


def _structure_union(value: Any, cls: Any) -> Any:
    members = [m for m in get_args(cls) if m is not types.NoneType]
    if value is None and len(members) < len(get_args(cls)):
        return None
    tried: list[Mistakes] = []
    for member in members:
        try:
            return converter.structure(value, member)
        except Mistakes as mistakes:
            tried.append(mistakes)
    # A table or list that is wrong inside is what was meant: tell what is wrong inside.
    deep = [m for m in tried if any(key for key, _ in m.found)]
    if deep:
        raise deep[0]
    got = f", got {show_value(value)}"
    wishes = [text.removesuffix(got).removeprefix("expected ") for m in tried for _, text in m.found]
    raise Mistakes([((), f"expected {' or '.join(dict.fromkeys(wishes))}{got}")])


def _structure_list(value: Any, cls: Any) -> list[Any]:
    if not isinstance(value, list):
        raise Mistakes([((), f"expected a list, got {show_value(value)}")])
    return list(_each(((str(i), item) for i, item in enumerate(value)), get_args(cls)[0]).values())


def _structure_dict(value: Any, cls: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Mistakes([((), f"expected a table, got {show_value(value)}")])
    return _each(value.items(), get_args(cls)[1])


def _each(items: Iterable[tuple[str, Any]], cls: Any) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    found: list[tuple[Key, str]] = []
    for name, item in items:
        try:
            kept[name] = converter.structure(item, cls)
        except Mistakes as mistakes:
            found += [((name, *inner), text) for inner, text in mistakes.found]
    if found:
        raise Mistakes(found)
    return kept


def _structure_period(value: Any, _: Any) -> Period:
    try:
        return Period.parse(value)
    except ValueError as error:
        raise Mistakes([((), str(error))]) from None


def _is(*origins: Any) -> Any:
    return lambda cls: get_origin(cls) in origins


def _anchor(value: Any, source: Source, key: Key) -> None:
    """Make the paths in settings absolute, each by the file that states it."""
    for inner, part in walk(value):
        if attrs.has(type(part)) and not isinstance(part, Period):
            for name in setting_fields(type(part)):
                folder = source.origin((*key, *inner, name)).folder
                object.__setattr__(part, name, _absolute(getattr(part, name), folder))


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, Path):
        return folder / value
    if isinstance(value, list):
        return [_absolute(item, folder) for item in value]
    if isinstance(value, dict):
        return {name: _absolute(item, folder) for name, item in value.items()}
    return value


converter = cattrs.Converter()
for _cls in _PLAIN:
    converter.register_structure_hook(_cls, _structure_plain)
converter.register_structure_hook(Period, _structure_period)
converter.register_structure_hook_func(_is(Literal), _structure_literal)
converter.register_structure_hook_func(_is(Union, types.UnionType), _structure_union)
converter.register_structure_hook_func(_is(list), _structure_list)
converter.register_structure_hook_func(_is(dict), _structure_dict)
converter.register_structure_hook_func(
    lambda cls: attrs.has(cls) and cls is not Period, structure
)
