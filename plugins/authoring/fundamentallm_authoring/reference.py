"""Generate the tables of settings and hooks in READMEs and docs from the classes."""

from __future__ import annotations

import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

import attrs

from fundamentallm import HOOKS, Hooks, RunSettings, SettingsError, about_hook, hook_methods, kind
from fundamentallm_authoring.fields import (
    is_table,
    limit_words,
    members,
    plain,
    settings_of,
    type_words,
)
from fundamentallm_authoring.sheet import toml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fundamentallm_authoring.fields import Setting

_MARKED = re.compile(
    r"(<!-- (?P<what>settings|hooks)(?:: (?P<name>\w+))? -->\n)"
    r"(?:(?!<!-- (?:settings|hooks)\b).)*?"
    r"(<!-- /(?P=what)(?:: (?P=name))? -->)",
    re.DOTALL,
)
_OPENING = re.compile(r"<!-- (?:settings|hooks)(?:: \w+)? -->")
_MADE = "<!-- Made by `fundamentallm reference`. Change the docstrings, not this page. -->"


def filled(text: str, plugins: Mapping[str, type], where: str) -> str:
    """Return a README with the tables of its plugins between its markers.

    The markers are ``<!-- settings -->`` … ``<!-- /settings -->`` and ``<!-- hooks -->`` …
    ``<!-- /hooks -->``, each alone in its line; in the README of several plugins
    ``<!-- settings: adamw -->``. Raises ``SettingsError`` for a marker that is not closed, or that
    names no plugin of the distribution.
    """
    if len(_OPENING.findall(text)) != len(list(_MARKED.finditer(text))):
        raise SettingsError(
            f"{where}: a marker is not closed: <!-- settings --> ends with "
            "<!-- /settings -->, <!-- hooks --> with <!-- /hooks -->"
        )

    def table(found: re.Match[str]) -> str:
        cls = plugins[_named(found["name"], plugins, where)]
        made = settings_table(cls) if found["what"] == "settings" else hooks_table(cls)
        return f"{found[1]}{made}{found[4]}"

    return _MARKED.sub(table, text)


def settings_table(cls: type) -> str:
    """Return the settings of a class as a Markdown table, inner tables below it."""
    settings = settings_of(cls)
    if not settings:
        return "No settings.\n"
    rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    rows += [_row(name, setting) for name, setting in _flat(settings)]
    return "\n".join(rows) + "\n"


def hooks_table(cls: type) -> str:
    """Return the hooks of a plugin class as a Markdown table, in the order of a run."""
    rows = [
        f"| `{hook}`{note} | {kind(hook)} | {_escaped(text)} |" for hook, note, text in answers(cls)
    ]
    if not rows:
        return "No hooks.\n"
    return "\n".join(["| hook | kind | what it does |", "|---|---|---|", *rows]) + "\n"


def answers(cls: type) -> Iterator[tuple[str, str, str]]:
    """Yield hook, ``" (wraps)"`` if it is a wrapper, and its first sentence, in a run's order."""
    methods = list(hook_methods(cls))
    for hook in HOOKS:
        for answered, options, function in methods:
            if answered == hook:
                text = function.__doc__ or getattr(Hooks, hook).__doc__ or ""
                yield hook, " (wraps)" if options["wrapper"] else "", _sentence(text)


def settings_page(plugins: Mapping[str, tuple[str, type]]) -> str:
    """Return a page of all settings; ``plugins``: name -> (distribution, class)."""
    parts = [_MADE, "# Settings", _SETTINGS_INTRODUCTION]
    parts += ["## `[run]`", _prose(RunSettings), settings_table(RunSettings)]
    for name, (distribution, cls) in sorted(plugins.items()):
        parts += [f"## `[{name}]`", f"`pip install {distribution}`", _prose(cls)]
        parts.append(settings_table(cls))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def hooks_page(plugins: Mapping[str, tuple[str, type]]) -> str:
    """Return a page of all hooks, each with the plugins that answer it."""
    story = inspect.cleandoc(sys.modules[Hooks.__module__].__doc__ or "")
    parts = [_MADE, "# Hooks", _fenced(story)]
    who: dict[str, list[str]] = {hook: [] for hook in HOOKS}
    for name, (_, cls) in sorted(plugins.items()):
        for hook, note, _ in answers(cls):
            who[hook].append(f"`{name}`{note}")
    for hook in HOOKS:
        function = getattr(Hooks, hook)
        signature = str(inspect.signature(function)).replace("(self, ", "(").replace("'", "")
        parts += [f"## `{hook}`", f"```python\n{hook}{signature}\n```"]
        facts = about_hook(hook)
        parts += [f"*{facts.kind}* · since {facts.since} · {facts.stability}"]
        parts += [_literals(inspect.cleandoc(function.__doc__ or ""))]
        parts += [f"Answered by: {', '.join(who[hook]) or 'no plugin listed here'}."]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


_SETTINGS_INTRODUCTION = """\
Each table of a settings file belongs to one plugin; `[run]` belongs to the core. Types are exact: \
`"1"` is no int and `1.5` is not rounded, but an int will do for a float. A period is a number of \
steps (`500`) or a text: `"500 steps"`, `"2 epochs"`, `"1e9 tokens"`, `"10 minutes"`. A relative \
path is relative to the file that states it."""


def _named(name: str | None, plugins: Mapping[str, type], where: str) -> str:
    known = ", ".join(sorted(plugins))
    if name is None and len(plugins) == 1:
        return next(iter(plugins))
    if name is None:
        raise SettingsError(
            f"{where}: say which plugin a marker is for, as in "
            f"<!-- settings: NAME -->; this distribution has: {known}"
        )
    if name not in plugins:
        raise SettingsError(f"{where}: no plugin {name!r} in this distribution; it has: {known}")
    return name


def _flat(settings: list[Setting], prefix: str = "") -> Iterator[tuple[str, Setting]]:
    for setting in settings:
        yield prefix + setting.name, setting
        for part in members(setting.type):
            if is_table(part):
                yield from _flat(settings_of(part), f"{prefix}{setting.name}.")


def _row(name: str, setting: Setting) -> str:
    words = " ".join(filter(None, [type_words(setting.type), limit_words(setting.limits)]))
    return (
        f"| `{name}` | {_escaped(words)} | {_default(setting.default)} "
        f"| {_escaped(_literals(setting.doc))} |"
    )


def _default(default: Any) -> str:
    if default is attrs.NOTHING:
        return "**required**"
    return "" if default is None else f"`{_escaped(toml(plain(default)))}`"


def _sentence(text: str) -> str:
    sentence, stop, _ = " ".join(_literals(text).split()).partition(". ")
    return sentence.rstrip(".") + "." if sentence or stop else ""


def _prose(cls: type) -> str:
    return _literals(inspect.cleandoc(cls.__doc__ or ""))


def _literals(text: str) -> str:
    return text.replace("``", "`")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _fenced(story: str) -> str:
    # The docstring is prose with one indented block, the run in pseudocode.
    block = re.compile(r"(?:^    .*\n|^\n(?=    .))+", re.MULTILINE)
    return block.sub(
        lambda found: f"\n```text\n{found[0].strip(chr(10))}\n```\n",
        _literals(story).replace("::\n", ":\n"),
    )
