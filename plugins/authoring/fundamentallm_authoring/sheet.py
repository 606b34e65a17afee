"""Write a settings file with every setting: defaults commented out, others with an example."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import tomli_w

from fundamentallm import Period, RunSettings
from fundamentallm_authoring.fields import (
    is_table,
    limit_words,
    members,
    plain,
    settings_of,
    type_words,
)

if TYPE_CHECKING:
    from fundamentallm_authoring.fields import Setting

STARTER = (
    "text",
    "gpt",
    "adamw",
    "lr_schedule",
    "accumulate",
    "grad_clip",
    "checkpoint",
    "sample",
    "progress",
    "jsonl",
    "console",
)
"""The plugins of a first run on text: those that ``fundamentallm[starter]`` installs."""

_HEAD = """\
# Train with:  fundamentallm train {name}
# Every setting is here. A line like "#key = value" shows a default, or an example of a setting
# that is unset by default: remove the # to change it.

plugins = [
{plugins}
]
"""
STEPS = "100 steps"


def sheet(instances: Mapping[str, type], name: str) -> str:
    """Return the text of a settings file called ``name`` for these plugins."""
    listed = "\n".join(f"    {toml(instance)}," for instance in instances)
    tables = {"run": RunSettings, **instances}
    return "\n".join(
        [_HEAD.format(name=name, plugins=listed), *(_table(n, cls) for n, cls in tables.items())]
    )


def summary(cls: type) -> str:
    """Return the first sentence of a class's docstring as one line without markup."""
    paragraph = " ".join((cls.__doc__ or "").replace("``", "").split("\n\n")[0].split())
    sentence, stop, _ = paragraph.partition(". ")
    return sentence + stop.strip()


def toml(value: Any) -> str:
    """Return a value as one line of TOML."""
    if isinstance(value, Mapping):
        pairs = [f"{_key(key)} = {toml(inner)}" for key, inner in value.items()]
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    if isinstance(value, list):
        return f"[{', '.join(toml(inner) for inner in value)}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def example(annotation: Any, limits: Mapping[str, Any]) -> Any:
    """Return a value that a setting of this type and these limits accepts."""
    kind = members(annotation)[0]
    origin = get_origin(kind)
    if origin is Literal:
        return get_args(kind)[0]
    if "enum" in limits:
        return limits["enum"][0]
    if kind in (int, float):
        return kind(_number(limits))
    if is_table(kind):
        needed = [setting for setting in settings_of(kind) if setting.required]
        return {setting.name: example(setting.type, setting.limits) for setting in needed}
    if origin in (list, dict):
        return ["example"] if kind == list[str] and not limits else origin()
    return {bool: False, str: "example", Path: "a/path", Period: STEPS}[kind]


def starting_values(cls: type) -> dict[str, Any]:
    """Return examples of the settings that a plugin needs.

    They are its required settings, and those without which building it raises a ``ValueError``
    that begins with the setting's name.
    """
    settings = {setting.name: setting for setting in settings_of(cls)}
    stated = {n: example(s.type, s.limits) for n, s in settings.items() if s.required}
    for _ in settings:
        try:
            structured = {n: _structured(settings[n].type, value) for n, value in stated.items()}
            cls(**structured)
        except ValueError as error:
            wanted = str(error).partition(":")[0]
            if wanted not in settings or wanted in stated:
                break
            stated[wanted] = example(settings[wanted].type, settings[wanted].limits)
        else:
            break
    return stated


def _structured(annotation: Any, value: Any) -> Any:
    kind = members(annotation)[0]
    if kind is Period:
        return Period.parse(value)
    if is_table(kind):
        inner = {setting.name: setting.type for setting in settings_of(kind)}
        return kind(**{name: _structured(inner[name], part) for name, part in value.items()})
    return Path(value) if kind is Path else value


def _table(name: str, cls: type) -> str:
    lines = [*_comment(summary(cls)), f"[{_key(name)}]"]
    stated = starting_values(cls)
    for setting in settings_of(cls):
        lines += [*_comment(_explanation(setting)), *_inner(setting)]
        lines.append(_assignment(setting, stated.get(setting.name)))
    return "\n".join(lines) + "\n"


def _explanation(setting: Setting) -> str:
    facts = [type_words(setting.type), limit_words(setting.limits)]
    if setting.required:
        facts.append("required; this is an example")
    elif setting.default is None:
        facts.append("unset by default")
    return f"{setting.doc} ({', '.join(fact for fact in facts if fact)})".lstrip()


def _inner(setting: Setting) -> list[str]:
    kinds = [part for kind in members(setting.type) for part in (kind, *get_args(kind))]
    tables = [kind for kind in kinds if is_table(kind)]
    inner = [each for kind in tables for each in settings_of(kind)]
    return [line for each in inner for line in _comment(f"- {each.name}: {_explanation(each)}")]


def _assignment(setting: Setting, stated: Any) -> str:
    if stated is not None:
        return f"{_key(setting.name)} = {toml(plain(stated))}"
    default = plain(setting.default)
    shown = example(setting.type, setting.limits) if default is None else default
    if shown == STEPS and not setting.accepts(Period.parse(shown)):
        shown = "10 minutes"
    return f"#{_key(setting.name)} = {toml(shown)}"


def _number(limits: Mapping[str, Any]) -> float:
    low = limits.get("minimum", limits.get("exclusiveMinimum"))
    high = limits.get("maximum", limits.get("exclusiveMaximum"))
    if "minimum" in limits:
        return float(low)
    if low is not None and high is not None:
        return float(low + high) / 2
    if low is not None:
        return float(low) + 1
    return 1.0 if high is None else float(high) - ("exclusiveMaximum" in limits)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text.replace("``", ""), 98, initial_indent="# ", subsequent_indent="# ")


def _key(name: str) -> str:
    return tomli_w.dumps({name: 0}).removesuffix(" = 0\n")
