"""``fundamentallm check``, ``lr-finder`` and ``batch-size-finder``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from fundamentallm import compose, settings_options

AMOUNT = click.IntRange(min=1)
RATE = click.FloatRange(min=0, max=1e6, min_open=True)


@click.command()
@settings_options
@click.option("--steps", type=AMOUNT, help="By default 2, or 300 and more on one batch.")
@click.option("--overfit-one-batch", is_flag=True, help="See if the first batch can be learned.")
def check(settings: Path, steps: int | None, overfit_one_batch: bool, **choice: Any) -> None:
    """Try what SETTINGS say, and estimate memory and time of the run.

    Builds everything, makes some steps, validates, saves and restores, all in a temporary folder.
    With --overfit-one-batch: trains on the first batch alone until its loss is near zero. Ends
    with the exit code of the run's error; with 1 where that batch cannot be learned.
    """
    if overfit_one_batch:
        composed = compose(settings, **choice)
        from fundamentallm_tuning.overfitting import learn

        click.echo(learn(composed, steps, click.echo))
        return
    compose(settings, **choice)  # mistakes are told before torch is imported
    from fundamentallm_tuning.inspection import inspect

    for line in inspect(partial(compose, settings, **choice), steps or 2):
        click.echo(line)


@click.command()
@settings_options
@click.option("--min", "low", type=RATE, default=1e-6, show_default=True, help="First rate.")
@click.option("--max", "high", type=RATE, default=1.0, show_default=True, help="Last rate.")
@click.option("--steps", type=click.IntRange(min=10), default=100, show_default=True)
def lr_finder(settings: Path, low: float, high: float, steps: int, **choice: Any) -> None:
    """Find a learning rate for SETTINGS: raise it step by step, and watch the loss.

    Ends with exit code 1 where the loss never falls, with 3 where it is no number from the start.
    """
    if not low < high:
        raise click.BadParameter(f"--min {low:g} is not below --max {high:g}")
    composed = compose(settings, **choice)
    from fundamentallm_tuning.range_test import measure, told

    click.echo("\n".join(told(composed, measure(composed, low, high, steps))))


@click.command()
@settings_options
@click.option("--min", "low", type=AMOUNT, default=1, show_default=True, help="First batch size.")
@click.option("--max", "high", type=AMOUNT, default=1024, show_default=True, help="Largest tried.")
@click.option(
    "--steps",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    help="Steps of each trial; the first is not timed.",
)
@click.option("--keep-step-size", is_flag=True, help="Keep the samples in a step: accumulate.")
def batch_size_finder(
    settings: Path, low: int, high: int, keep_step_size: bool, **choice: Any
) -> None:
    """Find the micro-batches that train SETTINGS fastest, and the largest that fit into memory."""
    if low > high:
        raise click.BadParameter(f"--min {low} is above --max {high}")
    steps = choice.pop("steps")
    composed = compose(settings, **choice)
    from fundamentallm_tuning.batch_sizes import find
    from fundamentallm_tuning.measuring import Wish

    wish = Wish(str(settings), choice, low, high, steps)
    find(composed, wish, click.echo, keeps_step_size=keep_step_size)
