"""``fundamentallm check``, ``lr-finder`` and ``batch-size-finder``."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import click

from fundamentallm import SettingsError, compose, settings_options

AMOUNT = click.IntRange(min=1)
RATE = click.FloatRange(min=0, max=1e6, min_open=True)
SIZES = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def in_one_process() -> None:
    """Raise ``SettingsError`` if torchrun or srun started this process as one of several."""
    for name in SIZES:
        size = os.environ.get(name, "1")
        if size != "1":
            raise SettingsError(
                f"this command tries the settings in one process, but it is one of several ({name} "
                f"is {size}): call it without a launcher; the plugins in the list may stay"
            )


@click.command()
@settings_options
@click.option("--steps", type=AMOUNT, help="By default 2, or 300 and more on one batch.")
@click.option("--overfit-one-batch", is_flag=True, help="Try to memorize the first batch.")
def check(settings: Path, steps: int | None, overfit_one_batch: bool, **choice: Any) -> None:
    """Try SETTINGS in a short run, and estimate memory and time of the whole run.

    Builds everything, trains some steps, validates, saves and restores, all in a temporary folder.
    With --overfit-one-batch: trains on the first batch alone until its loss is near zero. Ends
    with the exit code of the run's error; with 1 if that batch cannot be learned.
    """
    in_one_process()
    if overfit_one_batch:
        composed = compose(settings, **choice)
        from fundamentallm_tuning.overfit import learn

        click.echo(learn(composed, steps, click.echo))
        return
    composed = compose(settings, **choice)  # reports mistakes before torch is imported
    from fundamentallm_tuning import check_report
    from fundamentallm_tuning.check import check_settings
    from fundamentallm_tuning.trial import follows

    left_out = [name for name, one in composed.plugins.items() if follows(one)]
    for line in check_report.plugins(composed, left_out):
        click.echo(line)
    result = check_settings(partial(compose, settings, **choice), steps or 2)
    for line in check_report.lines(result):
        click.echo(line)
    if result.error is not None:
        raise result.error


@click.command()
@settings_options
@click.option("--min", "low", type=RATE, default=1e-6, show_default=True, help="First rate.")
@click.option("--max", "high", type=RATE, default=1.0, show_default=True, help="Last rate.")
@click.option("--steps", type=click.IntRange(min=10), default=100, show_default=True)
def lr_finder(settings: Path, low: float, high: float, steps: int, **choice: Any) -> None:
    """Find a learning rate for SETTINGS: raise it in each step, and record the loss.

    Ends with exit code 1 if the loss never falls, with 3 if it is not finite from the start.
    """
    in_one_process()
    if not low < high:
        raise click.BadParameter(f"--min {low:g} is not below --max {high:g}")
    composed = compose(settings, **choice)
    from fundamentallm_tuning.lr_finder import report, run_test

    click.echo("\n".join(report(composed, run_test(composed, low, high, steps))))


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
@click.option("--keep-step-size", is_flag=True, help="Keep the samples of a step: accumulate.")
def batch_size_finder(
    settings: Path, low: int, high: int, keep_step_size: bool, **choice: Any
) -> None:
    """Find the batch size that trains SETTINGS fastest, and the largest that fits into memory."""
    in_one_process()
    if low > high:
        raise click.BadParameter(f"--min {low} is above --max {high}")
    steps = choice.pop("steps")
    composed = compose(settings, **choice)
    from fundamentallm_tuning.batch_size_finder import find
    from fundamentallm_tuning.batch_size_worker import Request

    request = Request(str(settings), choice, low, high, steps)
    find(composed, request, click.echo, keeps_step_size=keep_step_size)
