"""Pieces of a command line: others' commands, options for settings, settings with their origins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from fundamentallm.host.compose import Composed
from fundamentallm.host.mistakes import suggest, written


class Commands(click.Group):
    """An application's own commands and those of installed distributions, loaded when called."""

    def __init__(self, *, entries: str, known: Mapping[str, str], **options: Any) -> None:
        """``entries`` is the entry-point group that distributions offer commands in, ``known`` the
        distributions of commands that may not be installed."""
        super().__init__(**options)
        self.offered_in, self.known = entries, known

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*super().list_commands(context), *self._entries()})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Return a command, loaded if it is another distribution's."""
        own, entry = super().get_command(context, name), self._entries().get(name)
        # No distribution can replace a command of the application itself.
        return entry.load() if own is None and entry else own

    def resolve_command(
        self, context: click.Context, words: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is called; for an unknown one say what to install or to type."""
        name = words[0]
        try:
            command = self.get_command(context, name)
        except Exception as error:  # noqa: BLE001 - whatever another's module does
            by, said = self._entries()[name].dist, f"{type(error).__name__}: {error}"
            who = f" ({by.name} {by.version})" if by else ""
            context.fail(f"the command {name!r}{who} cannot be loaded: {said}")
        if not name.startswith("-") and command is None:
            distribution = self.known.get(name)
            meant = suggest(name, {*self.list_commands(context), *self.known})
            advice = f": pip install {distribution}" if distribution else meant
            context.fail(f"there is no command {name!r}{advice}")
        return super().resolve_command(context, words)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands; one that cannot be loaded says so and hides no other."""
        with formatter.section("Commands"):
            names = self.list_commands(context)
            formatter.write_dl([(name, self._short_help(context, name)) for name in names])

    def _short_help(self, context: click.Context, name: str) -> str:
        try:
            command = self.get_command(context, name)
        except Exception as error:  # noqa: BLE001 - whatever another's module does
            return f"(cannot be loaded: {type(error).__name__}: {error})"
        return command.get_short_help_str(90) if command else ""

    def _entries(self) -> dict[str, metadata.EntryPoint]:
        return {e.name: e for e in metadata.entry_points(group=self.offered_in)}


def choice_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that change what a settings file says."""
    # click shows the option that is added last before the others.
    for option in (
        click.option("--no-plugin", "remove", multiple=True, help="Leave a plugin out."),
        click.option("--plugin", "add", multiple=True, help="Add a plugin to the list."),
        click.option("--set", "overrides", multiple=True, help="table.key=value, as in TOML."),
    ):
        command = option(command)
    return command


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add what every command takes that reads a settings file: its path, and these options."""
    return click.argument("settings", type=click.Path(path_type=Path))(choice_options(command))


def described(composed: Composed) -> list[str]:
    """Return the settings as TOML lines, each value with its origin as a comment."""
    tables = composed.tables
    lines = [_line(composed, ("plugins",), tables.pop("plugins"))]
    for name, table in tables.items():
        who = composed.brought.get(name)
        lines += ["", f"[{name}]" + (f"  # {who}" if who else "")]
        lines += [_line(composed, (name, key), value) for key, value in table.items()]
    return lines


def _line(composed: Composed, key: tuple[str, ...], value: Any) -> str:
    stated = composed.source.origins.get(key)
    return f"{key[-1]} = {written(value)}  # {stated.place if stated else 'default'}"
