"""``fundamentallm lr``: show the learning rate of a run before it starts."""

from __future__ import annotations

from pathlib import Path

import click

from fundamentallm import compose
from fundamentallm_lr_schedule.curve import trace_lr
from fundamentallm_lr_schedule.plot import text, write_png


@click.command()
@click.argument("settings", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, help="table.key=value, as in TOML.")
@click.option("--steps", type=click.IntRange(min=1), help="Draw a run of this many steps instead.")
@click.option("--png", type=click.Path(path_type=Path), help="Also write an image to this file.")
def lr(settings: Path, overrides: tuple[str, ...], steps: int | None, png: Path | None) -> None:
    """Draw the learning rate over the run of the settings file SETTINGS. Builds nothing."""
    length = () if steps is None else (f"run.length={steps}",)
    curve = trace_lr(compose(settings, overrides=[*overrides, *length]))
    click.echo(text(curve))
    if png is not None:
        write_png(curve, png, title=settings.name)
        click.echo(f"written: {png}")
