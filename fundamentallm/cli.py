"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import tomli_w

from fundamentallm.errors import FundamentalError, SettingsError
from fundamentallm.plugins import Composed, compose, find_plugins, hook_methods, order


class Commands(click.Group):
    """The core's commands and those of installed distributions, each loaded when it is called."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*super().list_commands(context), *self._entries()})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Return a command, loaded if it is another distribution's."""
        entries = self._entries()
        own = super().get_command(context, name)
        return entries[name].load() if own is None and name in entries else own

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands without loading them: the help of an entry is its distribution's."""
        rows = []
        for name in self.list_commands(context):
            own = super().get_command(context, name)
            entry = self._entries().get(name)
            about = entry.dist.name if entry and entry.dist else ""
            rows.append((name, own.get_short_help_str(90) if own else f"({about})"))
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
    composed = compose(settings, **choice)
    _train(composed, run_dir)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, help="table.key=value, as in TOML.")
def resume(run: Path, overrides: tuple[str, ...]) -> None:
    """Continue the run in folder RUN from its newest sound checkpoint."""
    if not (run / "settings.toml").is_file():
        raise SettingsError(f"{run}: is not a run folder: it has no settings.toml")
    _train(compose(run / "settings.toml", overrides=overrides), run)


@cli.command()
@settings_options
def show(settings: Path, **choice: Any) -> None:
    """Print the composed SETTINGS, and where each value comes from."""
    composed = compose(settings, **choice)
    for line in described(composed):
        click.echo(line)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def plugins(as_json: bool) -> None:
    """List the installed plugins."""
    rows = [{"name": f.name, "distribution": f.distribution, "version": f.version,
             "about": (f.load().__doc__ or "").partition("\n")[0]}
            for offers in find_plugins().values() for f in offers]  # fmt: skip
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(f"{row['name']:<16}{row['distribution']} {row['version']}\n    {row['about']}")


@cli.command()
@click.argument("settings", type=click.Path(path_type=Path), required=False)
def hooks(settings: Path | None) -> None:
    """Print the hooks in the order of a run, with SETTINGS who answers each."""
    from fundamentallm.hookspecs import HOOKS, kind
    listed = compose(settings).plugins if settings else {}
    methods = [(name, *method) for name in order(listed) for method in hook_methods(type(listed[name]))]
    for hook in HOOKS:
        heard = [name + (" (wraps)" if options["wrapper"] else "")
                 for name, found, options, _ in methods if found == hook]  # fmt: skip
        click.echo(f"{hook:<24}{kind(hook):<11}{', '.join(heard)}".rstrip())


def described(composed: Composed) -> list[str]:
    """Return the settings as TOML lines, each value with its origin as a comment."""
    lines: list[str] = []
    for name, table in composed.tables.items():
        if not isinstance(table, dict):
            lines.append(_line(name, table, composed, (name,)))
            continue
        lines += ["", f"[{name}]" + (f"  # {composed.brought[name]}" if name != "run" else "")]
        lines += [_line(key, value, composed, (name, key)) for key, value in table.items()]
    return lines


def _line(name: str, value: Any, composed: Composed, key: tuple[str, ...]) -> str:
    stated = composed.source.origins.get(key)
    text = f"{name} = {value}" if isinstance(value, dict) else tomli_w.dumps({name: value}).strip()
    return f"{text}  # {stated.place if stated else 'default'}"


def _train(composed: Composed, run_dir: Path | None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from fundamentallm.launch import train as launch
    from fundamentallm.record import new_folder

    folder = run_dir or new_folder(composed)
    advice = f"resume with: fundamentallm resume {folder}"
    try:
        run = launch(composed, run_dir=folder)
    except FundamentalError as error:
        saved = sorted(folder.glob("checkpoints/step-*"))
        if saved and not isinstance(error, SettingsError):
            error.add_note(f"the newest checkpoint is {saved[-1]}; {advice}")
        raise
    click.echo(f"{run.outcome} after {run.progress.step} steps: {folder}")
    if run.outcome == "interrupted":
        click.echo(advice, err=True)
        sys.exit(128 + (run.signal or 0))


def main() -> None:
    """Run the command line; every error that its user can act on ends with its exit code."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except FundamentalError as error:
        for line in (f"error: {error}", *getattr(error, "__notes__", ())):
            click.echo(line, err=True)
        sys.exit(error.exit_code)
