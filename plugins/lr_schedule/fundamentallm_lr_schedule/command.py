"""``fundamentallm lr``: see the learning rate of a run before it starts."""

from __future__ import annotations

from pathlib import Path

import click

from fundamentallm import compose
from fundamentallm_lr_schedule.curve import trace
from fundamentallm_lr_schedule.drawing import text, write_png


@click.command()
@click.argument("settings", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, help="table.key=value, as in TOML.")
@click.option("--steps", type=click.IntRange(min=1), help="Draw a run of this many steps.")
@click.option("--png", type=click.Path(path_type=Path), help="Also write a picture.")
def lr(settings: Path, overrides: tuple[str, ...], steps: int | None, png: Path | None) -> None:
    """Draw the learning rate over the run that SETTINGS describe; nothing is built."""
    length = () if steps is None else (f"run.length={steps}",)
    curve = trace(compose(settings, overrides=[*overrides, *length]))
    click.echo(text(curve))
    if png is not None:
        write_png(curve, png, title=settings.name)
        click.echo(f"written: {png}")
