"""The commands ``runs``, ``watch``, ``compare`` and ``rerun``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fundamentallm import choice_options
from fundamentallm_runs.console_io import number, replace_unknown_characters
from fundamentallm_runs.curves import AXES

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.argument("folder", type=FOLDER, default=Path("runs"))
@click.option("--metric", default="val/loss", show_default=True, help="Whose best value to show.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def runs(folder: Path, metric: str, as_json: bool) -> None:
    """List the runs in FOLDER (by default runs/), the newest last."""
    from fundamentallm_runs.list_runs import listed, notes, table

    replace_unknown_characters()
    rows = listed(folder, metric, lambda text: click.echo(text, err=True))
    if as_json:
        click.echo(json.dumps(rows, indent=2, allow_nan=False))
        return
    if not rows:
        click.echo(f"{folder}: no runs")
        return
    from fundamentallm_runs.tables import console, show

    numbers = ("step", "done", f"best {metric}", "at step", "last row")
    show(console(120), ["run", "state", *numbers], table(rows), right=numbers)
    for note in notes(rows):
        click.echo(note)


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--metric", "metrics", multiple=True, help="Show only these; may be repeated.")
@click.option(
    "--every",
    type=click.FloatRange(0.01, 3600),
    callback=number,
    default=0.5,
    show_default=True,
    help="Seconds between two reads.",
)
def watch(run: Path, metrics: tuple[str, ...], every: float) -> None:
    """Print the rows of RUN as they come, until it ends."""
    from fundamentallm_runs.list_runs import follow

    replace_unknown_characters()
    follow(run, metrics, every, click.echo)


@click.command()
@click.argument("runs", type=FOLDER, nargs=-1, required=True)
@click.option("--metric", "metrics", multiple=True, help="Metrics to tabulate; may be repeated.")
@click.option("--curve", "metric", help="The metric to draw. [default: val/loss or train/loss]")
@click.option("--x", "axis", type=click.Choice(AXES), default="step", show_default=True)
@click.option(
    "--smooth",
    type=click.FloatRange(0, 1, max_open=True),
    callback=number,
    default=0.0,
    help="From 0 to below 1.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write a .png, .svg or .html file.",
)
def compare(runs: tuple[Path, ...], **chosen: Any) -> None:
    """Compare RUNS: settings that differ, last and best metrics, and curves."""
    from fundamentallm_runs.compare import Chosen, compare_runs

    replace_unknown_characters()
    compare_runs(runs, Chosen(**chosen), click.echo)


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--run-dir", type=FOLDER, help="[default: RUN-rerun]")
@choice_options
@click.pass_context
def rerun(context: click.Context, /, run: Path, run_dir: Path | None, **choices: Any) -> None:
    """Repeat RUN from step 0, and compare weights and metrics bit by bit.

    Ends with exit code 1 if they differ.
    """
    from fundamentallm_runs.rerun import run_again

    result = run_again(run, run_dir, **choices)
    for line in result.lines():
        click.echo(line)
    if result.exit_code:
        context.exit(result.exit_code)
