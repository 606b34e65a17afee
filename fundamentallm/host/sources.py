"""Where settings come from: TOML files that extend each other, and ``--set`` on top of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import attrs
import tomli

from fundamentallm.host.mistakes import Key, Mistake, MistakeKind

_VALUE = "expected a number, true, false, a text in quotes, a [list] or a {table} as the value"
# What tomli says of the usual mistakes, and what their author needs to know.
_REASONS = {
    "Invalid value": _VALUE,
    "Invalid statement": "expected a line such as key = value, or [table]",
    "Expected newline or end of document after a statement": (
        "expected the end of the line after the value; a text needs quotes"
    ),
    "Illegal character '\\n'": "expected a quote before the end of the line",
    "Cannot overwrite a value": "this key has a value already, above",
    "Unclosed array": "expected a comma, or the ] that ends the list",
    "Unclosed inline table": "expected a comma, or the } that ends the table",
}


@attrs.frozen
class Origin:
    """Where a value was stated."""

    place: str
    """File and line, or ``--set``: what a message begins with."""
    folder: Path
    """The folder that relative paths begin in."""
    extended: bool = False
    """Whether the file is one that another file extends."""


@attrs.frozen
class Provenance:
    """Where the class of a plugin comes from."""

    kind: Literal["distribution", "file", "object"]
    """``object``: an instance that Python code gave to ``compose``."""
    name: str
    """Of the distribution, of the file (its path), or of the module that has the class."""
    version: str = ""
    """Of the distribution."""

    def __str__(self) -> str:
        given = ", given as an object" if self.kind == "object" else ""
        return f"{self.name} {self.version}".strip() + given

    @classmethod
    def from_json(cls, facts: Any) -> Provenance | None:
        """Return what ``attrs.asdict`` wrote; None if the facts are not of that form."""
        try:
            return cls(facts["kind"], str(facts["name"]), str(facts.get("version", "")))
        except (AttributeError, LookupError, TypeError):
            return None


@attrs.define
class Source:
    """Settings as one tree of plain values, with the origin of each and the mistakes so far."""

    path: Path | None = None
    values: dict[str, Any] = attrs.field(factory=dict)
    origins: dict[Key, Origin] = attrs.field(factory=dict)
    mistakes: list[Mistake] = attrs.field(factory=list)
    recorded: Mapping[str, Provenance] = attrs.field(factory=dict)
    """Where the plugins of the earlier run came from whose settings these are, by name."""

    def origin(self, key: Key) -> Origin:
        """Return the origin of a key, or of the innermost table around it that has one."""
        while key and key not in self.origins:
            key = key[:-1]
        folder = self.path.parent if self.path else Path.cwd()
        return self.origins.get(key) or Origin(str(self.path or "settings"), folder)

    def blame(self, key: Key, text: str, kind: MistakeKind = "value", hook: str = "") -> None:
        """Note a mistake at a key; its message is ``place: path: text``."""
        self.note(Mistake(key, kind, text, hook=hook))

    def note(self, mistake: Mistake, below: Key = ()) -> None:
        """Note a mistake in what stands at the key ``below``, with its place."""
        key = below + mistake.key
        self.mistakes.append(attrs.evolve(mistake, key=key, place=self.origin(key).place))

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
    """Lay a file over the source, after those that it extends.

    ``above`` are the files that extend it, ``asked`` is the place where the last one says so.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        values = tomli.loads(text)
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        place, why = _unreadable(path, asked, error)
        source.mistakes.append(Mistake((), "syntax", why, place=place))
        return
    lines, chain = statement_lines(text), (*above, path.resolve())
    base = values.pop("extends", None)
    asked = f"{path}:{lines.get(('extends',))}: extends"
    # By their resolved paths, since one file has many: through links, and through "..".
    if isinstance(base, str) and (path.parent / base).resolve() not in chain:
        _read_file(source, path.parent / base, chain, asked)
    elif base is not None:
        circle = f"a circle: {base} extends this file too"
        why = circle if isinstance(base, str) else "expected a path"
        source.mistakes.append(Mistake((), "syntax", why, place=asked))
    folder = path.parent.resolve()
    source.merge(
        values, {key: Origin(f"{path}:{line}", folder, bool(above)) for key, line in lines.items()}
    )


def _unreadable(path: Path, asked: str, error: Exception) -> tuple[str, str]:
    """Return the place where a file cannot be read, and why."""
    if isinstance(error, UnicodeDecodeError):
        before = error.object[: error.start]
        line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
        byte = f"0x{error.object[error.start]:02x}"
        return f"{path}:{line}:{column}", f"is not UTF-8 (byte {byte}): save the file as UTF-8"
    if isinstance(error, OSError):
        return ": ".join(filter(None, (asked, str(path)))), error.strerror or str(error)
    # tomli states the position since version 2.1.
    position = (getattr(error, "lineno", ""), getattr(error, "colno", ""))
    said = getattr(error, "msg", None) or str(error)
    return ":".join(map(str, (path, *filter(None, position)))), _REASONS.get(said, said)


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
    why = "expected table.key=value, with a TOML value"
    source.mistakes.append(Mistake((), "syntax", why, place=f"--set {override}"))


def statement_lines(text: str) -> dict[Key, int]:
    """Return the line on which the statement of each key begins, in a valid TOML text.

    The parser does not return the positions of values, so each statement is found with it: it is
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
