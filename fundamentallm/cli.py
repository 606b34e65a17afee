"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from fundamentallm import host
from fundamentallm.errors import FundamentalError, StorageError
from fundamentallm.folder import is_run
from fundamentallm.process import command_line
from fundamentallm.settings import FIRST_PARTY, Composed, compose
from fundamentallm.threads import sharing_cores


@click.group(cls=host.Commands, entries="fundamentallm.commands", known=FIRST_PARTY["commands"])
@click.version_option(package_name="fundamentallm")
def cli() -> None:
    """Train language models, and any other PyTorch model, from a TOML file."""


@cli.command()
@host.settings_options
@click.option("--run-dir", type=click.Path(path_type=Path), help="Run folder to start or continue.")
def train(settings: Path, run_dir: Path | None, **choice: Any) -> None:
    """Train with SETTINGS in a new run folder."""
    _train(compose(settings, **choice), run_dir)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@host.choice_options
@click.option(
    "--from",
    "at",
    help="Checkpoint to continue from: step-00000500, best or latest; default: the newest sound.",
)
def resume(run: Path, at: str | None, **choice: Any) -> None:
    """Continue the run in run folder RUN from a checkpoint."""
    from fundamentallm.launch import recorded

    _train(recorded(run, **choice), run, at)


@cli.command()
@host.settings_options
def show(settings: Path, **choice: Any) -> None:
    """Print the composed SETTINGS, and where each value comes from."""
    click.echo("\n".join(host.described(compose(settings, **choice))))


def _train(composed: Composed, run_dir: Path | None, at: str | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with sharing_cores():
        from fundamentallm.launch import train as launch

        run = launch(composed, run_dir=run_dir, at=at)
    if not run.rank:
        click.echo(f"{run.outcome} after {run.progress.step} steps: {run.folder}")
    if run.outcome == "interrupted":
        if not run.rank and is_run(run.folder):  # its disk may have refused even that
            click.echo(f"resume with: {command_line('resume', run.folder)}", err=True)
        sys.exit(128 + (run.signal or 0))


def main() -> None:
    """Run the command line; an error that its user can act on is printed and sets the exit code."""
    try:
        # In standalone mode click would end the process itself, with exit codes of its own.
        code = cli.main(prog_name=command_line(), standalone_mode=False)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (FundamentalError, OSError) as error:  # such as an output that takes no more
        if not getattr(error, "printed_elsewhere", False):
            click.echo("\n".join([f"error: {error}", *getattr(error, "__notes__", ())]), err=True)
        sys.exit(getattr(error, "exit_code", StorageError.exit_code))
    sys.exit(
        code if isinstance(code, int) else 0
    )  # click returns the argument of a command's exit()
