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
    """Where a value was stated: what to print before a complaint, where paths begin."""

    place: str
    folder: Path
    extended: bool = False


@attrs.define
class Source:
    """Settings as one tree of plain values, with the origin of each and the mistakes so far."""

    path: Path | None = None
    values: dict[str, Any] = attrs.field(factory=dict)
    origins: dict[Key, Origin] = attrs.field(factory=dict)
    problems: list[str] = attrs.field(factory=list)

    def origin(self, key: Key) -> Origin:
        """Return the origin of a key, or of the closest table around it."""
        while key and key not in self.origins:
            key = key[:-1]
        folder = self.path.parent if self.path else Path.cwd()
        return self.origins.get(key) or Origin(str(self.path or "settings"), folder)

    def blame(self, key: Key, text: str) -> None:
        """Note a mistake at a key as ``place: path: what is wrong``."""
        self.problems.append(f"{self.origin(key).place}: {'.'.join(key)}: {text}")

    def merge(self, values: Mapping[str, Any], origins: Mapping[Key, Origin]) -> None:
        """Lay another layer over this one: tables merge, arrays and scalars replace."""
        _merge(self.values, values)
        self.origins.update(origins)


def read(settings: Path | str | Mapping[str, Any], overrides: Iterable[str] = ()) -> Source:
    """Read settings and lay the overrides (``"table.key=value"``) over them."""
    if isinstance(settings, Mapping):
        source, here = Source(), Origin("settings", Path.cwd())
        source.merge(settings, dict.fromkeys(_keys(settings), here))
    else:
        source = Source(Path(settings))
        _read_file(source, Path(settings))
    for override in overrides:
        _override(source, override)
    return source


def _read_file(source: Source, path: Path, above: tuple[Path, ...] = (), asked: str = "") -> None:
    try:
        text = path.read_bytes().decode("utf-8")
        values = tomli.loads(text)
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        place = f"{path}:{error.lineno}" if hasattr(error, "lineno") else f"{asked}{path}"
        said = getattr(error, "msg", None) or getattr(error, "strerror", None) or error
        source.problems.append(f"{place}: {said}")
        return
    lines, chain = statement_lines(text), (*above, path.resolve())
    base = values.pop("extends", None)
    asked = f"{path}:{lines.get(('extends',))}: extends: "
    if isinstance(base, str) and (path.parent / base).resolve() not in chain:
        _read_file(source, path.parent / base, chain, asked)
    elif base is not None:
        circle = f"a circle: {base} extends this file too"
        source.problems.append(asked + (circle if isinstance(base, str) else "expected a path"))
    folder = path.parent.resolve()
    source.merge(
        values, {key: Origin(f"{path}:{line}", folder, bool(above)) for key, line in lines.items()}
    )


def _override(source: Source, override: str) -> None:
    key, sign, value = override.partition("=")
    # A bare word or path is taken as a string, so that the shell needs no second quotes.
    for form in (override, f"{key} = {json.dumps(value, ensure_ascii=False)}") if sign else ():
        try:
            values = tomli.loads(form)
        except tomli.TOMLDecodeError:
            continue
        source.merge(values, dict.fromkeys(_keys(values), Origin("--set", Path.cwd())))
        return
    source.problems.append(f"--set {override}: expected table.key=value, with a TOML value")


def statement_lines(text: str) -> dict[Key, int]:
    """Return the line that the statement of each key of a sound TOML text begins on.

    The parser tells no positions of values, so it serves as the oracle instead: a statement is
    the shortest run of lines that parses by itself.
    """
    lines: dict[Key, int] = {}
    counts: dict[Key, int] = {}
    prefix: Key = ()
    buffer, start = "", 0
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() splits inside strings too
        if not buffer and (not line.strip() or line.lstrip().startswith("#")):
            continue
        start = start if buffer else number
        buffer += line + "\n"
        try:
            keys = list(_keys(tomli.loads(buffer)))
        except tomli.TOMLDecodeError:
            continue
        if buffer.lstrip().startswith("["):
            prefix = keys[-1]
            if buffer.lstrip().startswith("[["):
                counts[prefix] = counts.get(prefix, -1) + 1
                prefix = (*prefix, str(counts[prefix]))
            lines[prefix] = start
            keys = [()]
        for key in (prefix + key for key in keys):
            for n in range(1, len(key) + 1):  # [a.b] and a.b = 1 state the table a as well
                lines.setdefault(key[:n], start)
        buffer = ""
    return lines


def _keys(values: Mapping[str, Any], prefix: Key = ()) -> Iterator[Key]:
    for name, value in values.items():
        yield (*prefix, name)
        if isinstance(value, Mapping):
            yield from _keys(value, (*prefix, name))


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for name, value in above.items():
        if isinstance(value, Mapping):
            below[name] = below[name] if isinstance(below.get(name), dict) else {}
            _merge(below[name], value)
        else:
            below[name] = value
