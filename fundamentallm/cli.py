"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from fundamentallm.errors import FundamentalError, SettingsError
from fundamentallm.plugins import Composed, compose
from fundamentallm.settings import written


class Commands(click.Group):
    """The core's commands and those of installed distributions, each loaded when it is called."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*super().list_commands(context), *self._entries()})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Return a command, loaded if it is another distribution's."""
        own, entry = super().get_command(context, name), self._entries().get(name)
        return entry.load() if own is None and entry else own

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands without loading them: the help of an entry is its distribution's."""
        by = {n: entry.dist.name if entry.dist else "?" for n, entry in self._entries().items()}
        own = {name: command.get_short_help_str(90) for name, command in self.commands.items()}
        rows = [(name, own.get(name, f"({by.get(name)})")) for name in self.list_commands(context)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    @staticmethod
    def _entries() -> dict[str, metadata.EntryPoint]:
        return {e.name: e for e in metadata.entry_points(group="fundamentallm.commands")}


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add what every command takes that reads a settings file."""
    for option in (
        click.option("--no-plugin", "remove", multiple=True, help="Leave a plugin out."),
        click.option("--plugin", "add", multiple=True, help="Add a plugin to the list."),
        click.option("--set", "overrides", multiple=True, help="table.key=value, as in TOML."),
        click.argument("settings", type=click.Path(path_type=Path)),
    ):
        command = option(command)
    return command


@click.group(cls=Commands)
@click.version_option(package_name="fundamentallm")
def cli() -> None:
    """Train language models, and any other PyTorch model, from a TOML file."""


@cli.command()
@settings_options
@click.option("--run-dir", type=click.Path(path_type=Path), help="Start or continue this run.")
def train(settings: Path, run_dir: Path | None, **choice: Any) -> None:
    """Train as SETTINGS say, in a new run folder."""
    _train(compose(settings, **choice), run_dir)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, help="table.key=value, as in TOML.")
def resume(run: Path, overrides: tuple[str, ...]) -> None:
    """Continue the run in folder RUN from its newest sound checkpoint."""
    from fundamentallm.launch import recorded
    _train(recorded(run, overrides), run)


@cli.command()
@settings_options
def show(settings: Path, **choice: Any) -> None:
    """Print the composed SETTINGS, and where each value comes from."""
    for line in described(compose(settings, **choice)):
        click.echo(line)


def described(composed: Composed) -> list[str]:
    """Return the settings as TOML lines, each value with its origin as a comment."""
    tables = composed.tables
    lines = [_line(composed, ("plugins",), tables.pop("plugins"))]
    for name, table in tables.items():
        lines += ["", f"[{name}]" + (f"  # {composed.brought[name]}" if name != "run" else "")]
        lines += [_line(composed, (name, key), value) for key, value in table.items()]
    return lines


def _line(composed: Composed, key: tuple[str, ...], value: Any) -> str:
    stated = composed.source.origins.get(key)
    return f"{key[-1]} = {written(value)}  # {stated.place if stated else 'default'}"


def _train(composed: Composed, run_dir: Path | None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from fundamentallm.launch import train as launch
    from fundamentallm.record import new_folder

    folder = run_dir or new_folder(composed)
    advice = f"resume with: fundamentallm resume {folder}"
    try:
        run = launch(composed, run_dir=folder)
    except Exception as error:
        saved = [path for path in sorted(folder.glob("checkpoints/step-*")) if _finite(path)]
        if saved and not isinstance(error, SettingsError):
            error.add_note(f"the newest finite checkpoint is {saved[-1]}; {advice}")
        raise
    click.echo(f"{run.outcome} after {run.progress.step} steps: {folder}")
    if run.outcome == "interrupted":
        click.echo(advice, err=True)
        sys.exit(128 + (run.signal or 0))


def _finite(checkpoint: Path) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return bool(json.loads((checkpoint / "manifest.json").read_bytes())["finite"])
    return False


def main() -> None:
    """Run the command line; every error that its user can act on ends with its exit code."""
    try:
        code = cli.main(standalone_mode=False)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except FundamentalError as error:
        click.echo("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]), err=True)
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)  # click returns what a command's exit() said
