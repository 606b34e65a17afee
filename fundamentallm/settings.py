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
from attrs.validators import ge, matches_re, optional

from fundamentallm.declare import field, plugin, setting_fields
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
    seed: int = field(default=1337, validator=ge(0))
    """The one seed: initial weights, data order, dropout and samples all derive from it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; "auto" takes the GPU if there is one."""
    name: str | None = field(default=None, validator=optional(matches_re(r"\w[\w.+-]*")))
    """The run's name, and its folder's; by default that of the settings file."""
    folder: Path = Path("runs")
    """The folder that run folders are made in; the default is one where the command is run."""


class Mistakes(ValueError):
    """Mistakes in one value, each with the keys that lead to it from there."""

    def __init__(self, *found: tuple[Key, str]) -> None:
        self.found = found


def build(cls: type[T], values: Any, source: Source, key: Key) -> T | None:
    """Make a plugin or table of the values at ``key``; None, and noted mistakes, if it fails."""
    try:
        built = structure(values, cls)
    except Mistakes as mistakes:
        for inner, text in mistakes.found:
            source.blame(key + inner, text)
        return None
    for name in values:
        folder = source.origin((*key, name)).folder
        setattr(built, name, _absolute(getattr(built, name), folder))
    return built


def structure(values: Any, cls: type[T]) -> T:
    """Check a table against the fields of a class and make an instance; raise ``Mistakes``."""
    if not isinstance(values, dict):
        raise Mistakes(((), f"expected a table, got {show(values)}"))
    fields = setting_fields(cls)
    found: list[tuple[Key, str]] = [
        ((name,), f"unknown setting{suggest(name, fields)}") for name in values if name not in fields
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
    kept = converter.structure(value, cast("Any", attribute.type))
    try:
        if attribute.validator is not None:
            attribute.validator(None, attribute, kept)
    except (ValueError, TypeError) as error:  # attrs names the field again: once is enough
        raise Mistakes(((), re.sub(r"^'\w+' ", "", str(error.args[0])))) from None
    return kept


def plain(value: Any) -> Any:
    """Turn settings back into what TOML can hold; fields that are None are left out."""
    if isinstance(value, Period | Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, dict) or attrs.has(type(value)):
        return {str(name): plain(inner) for name, inner in _parts(value) if inner is not None}
    return value


def walk(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield every value inside the settings of a plugin, with its key."""
    yield key, value
    for name, part in enumerate(value) if isinstance(value, list | tuple) else _parts(value):
        yield from walk(part, (*key, str(name)))


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    if attrs.has(type(value)) and not isinstance(value, Period):
        return [(name, getattr(value, name)) for name in setting_fields(type(value))]
    return value.items() if isinstance(value, dict) else ()


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)``, or what is known if nothing comes close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(names)})" if 0 < len(names) <= 16 else ""


def show(value: Any) -> str:
    """Write a value the way TOML would."""
    return json.dumps(value, default=str)


def _structure_plain(value: Any, cls: Any) -> Any:
    accepted, name = _PLAIN[cls]
    if not isinstance(value, accepted) or (isinstance(value, bool) and cls is not bool):
        raise Mistakes(((), f"expected {name}, got {show(value)}"))
    return Path(str(value)).expanduser() if cls is Path else cls(value)


def _structure_literal(value: Any, cls: Any) -> Any:
    allowed = get_args(cls)
    if any(value == choice and type(value) is type(choice) for choice in allowed):
        return value
    hint = suggest(str(value), map(str, allowed))
    raise Mistakes(((), f"unknown value {show(value)}{hint}"))


def _structure_union(value: Any, cls: Any) -> Any:
    if value is None and types.NoneType in get_args(cls):
        return None
    tried: list[Mistakes] = []
    for member in get_args(cls):
        if member is not types.NoneType:
            try:
                return converter.structure(value, member)
            except Mistakes as mistakes:
                tried.append(mistakes)
    for inside in tried:  # A table or list that is wrong inside is what was meant.
        if any(key for key, _ in inside.found):
            raise inside
    got = f", got {show(value)}"
    texts = (text.removesuffix(got) for mistakes in tried for _, text in mistakes.found)
    wishes = dict.fromkeys(text.removeprefix("expected ") for text in texts)
    raise Mistakes(((), f"expected {' or '.join(wishes)}{got}"))


def _structure_many(value: Any, cls: Any) -> Any:
    wanted, *_, inner = (get_origin(cls), *get_args(cls))
    if not isinstance(value, (list, tuple) if wanted is list else dict):
        what = "list" if wanted is list else "table"
        raise Mistakes(((), f"expected a {what}, got {show(value)}"))
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


def _structure_period(value: Any, _: Any) -> Period:
    try:
        return Period.parse(value)
    except ValueError as error:
        raise Mistakes(((), str(error))) from None


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, Path):
        return folder / value
    if isinstance(value, list):
        return [_absolute(item, folder) for item in value]
    parts = {name: _absolute(item, folder) for name, item in _parts(value)}
    return parts if isinstance(value, dict) else attrs.evolve(value, **parts) if parts else value


converter = cattrs.Converter()
for _cls in _PLAIN:
    converter.register_structure_hook(_cls, _structure_plain)
for _hook, *_origins in (
    (_structure_literal, Literal),
    (_structure_many, list, dict),
    (_structure_union, Union, types.UnionType),
):
    converter.register_structure_hook_func(
        partial(lambda origins, cls: get_origin(cls) in origins, _origins), _hook
    )
converter.register_structure_hook_func(attrs.has, structure)
converter.register_structure_hook(Period, _structure_period)
