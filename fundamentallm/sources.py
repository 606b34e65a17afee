"""Where settings come from: TOML files that extend each other, and ``--set`` on top of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import tomli

Key: TypeAlias = tuple[str, ...]


@attrs.frozen
class Origin:
    """Where a value was stated: what to print before a complaint, and what paths are relative to."""

    place: str
    folder: Path
    extended: bool = False


@attrs.define
class Source:
    """Settings as one tree of plain values, with the origin of each and the mistakes so far."""

    values: dict[str, Any] = attrs.field(factory=dict)
    origins: dict[Key, Origin] = attrs.field(factory=dict)
    problems: list[str] = attrs.field(factory=list)
    path: Path | None = None

    def origin(self, key: Key) -> Origin:
        """Return the origin of a key, or of the closest table around it."""
        while key and key not in self.origins:
            key = key[:-1]
        place = str(self.path) if self.path else "settings"
        return self.origins.get(key) or Origin(place, self.path.parent if self.path else Path.cwd())

    def blame(self, key: Key, text: str) -> None:
        """Note a mistake at a key as ``place: path: what is wrong``."""
        path = ".".join(key)
        self.problems.append(f"{self.origin(key).place}: {path}: {text}" if path else text)

    def merge(self, values: Mapping[str, Any], origins: Mapping[Key, Origin]) -> None:
        """Lay another layer over this one: tables merge, arrays and scalars replace."""
        _merge(self.values, values)
        self.origins.update(origins)


def read(settings: Path | str | Mapping[str, Any], overrides: Iterable[str] = ()) -> Source:
    """Read settings and lay the overrides (``"table.key=value"``) over them."""
    source = Source()
    if isinstance(settings, Mapping):
        here = Origin("settings", Path.cwd())
        values = json_like(settings)
        source.merge(values, {key: here for key, _ in _leaves(values)})
    else:
        source.path = Path(settings).resolve()
        _read_file(source, Path(settings), ())
    for override in overrides:
        _override(source, override)
    return source


def json_like(value: Any) -> Any:
    """Copy a tree of mappings and sequences as dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): json_like(inner) for key, inner in value.items()}
    return [json_like(inner) for inner in value] if isinstance(value, list | tuple) else value


def _read_file(source: Source, path: Path, extending: tuple[Path, ...]) -> None:
    chain = (*extending, path.resolve())
    place = str(path)
    if path.resolve() in extending:
        source.problems.append(f"{place}: extends itself: {' -> '.join(map(str, chain))}")
        return
    try:
        text = path.read_bytes().decode("utf-8")
        values = tomli.loads(text)
    except OSError as error:
        source.problems.append(f"{place}: cannot be read: {error.strerror}")
        return
    except UnicodeDecodeError as error:
        source.problems.append(f"{place}: is not UTF-8 text (byte {error.start})")
        return
    except tomli.TOMLDecodeError as error:
        source.problems.append(f"{place}:{error.lineno}: not TOML: {error.msg}")
        return
    lines = dict(statement_lines(text))
    base = values.pop("extends", None)
    if isinstance(base, str):
        _read_file(source, path.parent / base, chain)
    elif base is not None:
        source.problems.append(f"{place}:{lines[('extends',)]}: extends: expected a path")
    here = {key: Origin(f"{place}:{line}", path.parent.resolve(), bool(extending))
            for key, line in lines.items()}  # fmt: skip
    source.merge(values, here)


def _override(source: Source, override: str) -> None:
    key, equals, value = override.partition("=")
    try:
        values = tomli.loads(override)
    except tomli.TOMLDecodeError:
        try:  # A bare word or path is taken as a string, so that the shell needs no second quotes.
            values = tomli.loads(f"{key} = {json.dumps(value)}")
        except tomli.TOMLDecodeError:
            values = {}
    if not equals or not values:
        source.problems.append(f"--set {override}: expected table.key=value, with a TOML value")
        return
    source.merge(values, {k: Origin("--set", Path.cwd()) for k, _ in _leaves(values)})


def statement_lines(text: str) -> Iterator[tuple[Key, int]]:
    """Yield each key of a sound TOML text with the line its statement begins on.

    The parser tells no positions of values, so it serves as the oracle instead: a statement is
    the shortest run of lines that parses by itself.
    """
    prefix: Key = ()
    buffer, start = "", 0
    counts: dict[Key, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not buffer and (not line.strip() or line.lstrip().startswith("#")):
            continue
        start = start if buffer else number
        buffer += line + "\n"
        try:
            parsed = tomli.loads(buffer)
        except tomli.TOMLDecodeError:
            continue
        if buffer.lstrip().startswith("["):
            prefix = _header(parsed)
            if buffer.lstrip().startswith("[["):
                counts[prefix] = counts.get(prefix, -1) + 1
                prefix = (*prefix, str(counts[prefix]))
            yield prefix, start
        else:
            for key, _ in _leaves(parsed):
                yield prefix + key, start
        buffer = ""


def _header(parsed: dict[str, Any]) -> Key:
    key: Key = ()
    inner: Any = parsed
    while isinstance(inner, dict) and inner:
        name, inner = next(iter(inner.items()))
        key = (*key, name)
    return key


def _leaves(values: Mapping[str, Any], prefix: Key = ()) -> Iterator[tuple[Key, Any]]:
    for name, value in values.items():
        yield (*prefix, name), value
        if isinstance(value, Mapping):
            yield from _leaves(value, (*prefix, name))


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for name, value in above.items():
        if isinstance(value, Mapping):
            if not isinstance(below.get(name), dict):
                below[name] = {}
            _merge(below[name], value)
        else:
            below[name] = value
