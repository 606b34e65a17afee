"""What is wrong with settings, as facts; the text of a message is made from them last."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import attrs

Key: TypeAlias = tuple[str, ...]
MistakeKind: TypeAlias = Literal[
    "syntax",  # a file or an override cannot be read
    "type",  # a value has another type than its setting
    "choice",  # a value is none of those that a setting allows
    "unknown",  # there is no such setting or table
    "missing",  # a setting without a default is not stated
    "value",  # a check of a plugin or of the application refuses a value
    "plugin",  # a plugin is listed twice, cannot be found, or cannot be loaded
    "hook",  # the hooks of the plugins do not fit the application, or each other
    "required",  # no plugin answers a hook that has no default
]


@attrs.frozen
class Mistake:
    """One thing that is wrong with settings; ``str()`` of it is the message."""

    key: Key
    """The path of the setting."""
    kind: MistakeKind
    text: str
    """What is wrong; of the kind "type", what was expected, such as ``"a whole number"``."""
    got: Any = None
    """The value of the wrong type."""
    place: str = ""
    """File and line, or another origin of the value."""
    hook: str = ""
    """The hook that no plugin answers, of the kind "required"."""

    def __str__(self) -> str:
        what = self.text
        if self.kind == "type":
            what = f"expected {self.text}, got {written(self.got)}"
        return ": ".join(filter(None, (self.place, ".".join(self.key), what)))


class Mistakes(Exception):
    """Mistakes in one value, each with the keys that lead to it from there."""

    def __init__(self, *found: Mistake) -> None:
        self.found = found


class WrongForm(ValueError):
    """A value that the ``parse`` of a class cannot read; ``expected`` says what it reads."""

    def __init__(self, expected: str, got: Any) -> None:
        self.expected = expected
        super().__init__(f"expected {expected}, got {written(got)}")


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to ``name``; None if none is similar."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1)), None)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)``, or the known names if there are few and none is close."""
    names = sorted(known)
    close = closest(name, names)
    if close is not None:
        return f" (did you mean {close!r}?)"
    return f" (known: {', '.join(names)})" if 0 < len(names) <= 16 else ""


def written(value: Any) -> str:
    """Write a value as TOML, in one line: which is JSON, but for the sign in inline tables."""
    return json.dumps(value, default=str, ensure_ascii=False, separators=(", ", " = "))
