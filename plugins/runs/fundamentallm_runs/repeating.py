"""The command ``rerun``: repeat a run from its record, and say whether it came out the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fundamentallm import SettingsError
from fundamentallm_runs.record import Record, named, read
from fundamentallm_runs.rows import read_rows

if TYPE_CHECKING:
    from torch import Tensor

MEASURED = ("perf/", "system/")
UNSAVED = "weights: none were saved to compare with"


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.option("--run-dir", type=click.Path(path_type=Path), help="[default: RUN-rerun]")
@click.option("--set", "overrides", multiple=True, help="table.key=value, as in TOML.")
@click.pass_context
def rerun(
    context: click.Context, run: Path, run_dir: Path | None, overrides: tuple[str, ...]
) -> None:
    """Repeat RUN from step 0, and compare weights and metrics bit by bit.

    Ends with exit code 1 if they differ.
    """
    from fundamentallm import recorded, train

    before = read(run)
    folder = run_dir or named(run).with_name(f"{before.name}-rerun")
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"{folder}: is not empty; name another with --run-dir")
    composed, weights = recorded(run, overrides), saved_weights(run)  # before hours are spent
    made = train(composed, run_dir=folder)
    after = read(folder)
    for line in versions(before, after):
        click.echo(line)
    told = [different_rows(before, after), different_weights(weights, made.model.state_dict())]
    for line in told:
        click.echo(line)
    same = all(line.endswith("identical") or line == UNSAVED for line in told)
    click.echo("the run is reproduced" if same else "the run is not reproduced")
    if not same:
        context.exit(1)


def versions(before: Record, after: Record) -> list[str]:
    """Return a line for everything that the two runs did not have in common."""
    lines = []
    for part in ("versions", "plugins"):
        old, new = (one.environment.get(part, {}) for one in (before, after))
        lines += [f"{name}: was {old.get(name, 'absent')}, is {new.get(name, 'absent')}"
                  for name in sorted({*old, *new}) if old.get(name) != new.get(name)]  # fmt: skip
    for part in ("python", "platform", "host", "processor", "threads"):
        old, new = (one.environment.get(part) for one in (before, after))
        lines += [f"{part}: was {old}, is {new}"] if old != new else []
    return lines


def different_rows(before: Record, after: Record) -> str:
    """Tell whether both runs logged the same, measurements of time and memory aside."""
    files = (one.folder / "metrics.jsonl" for one in (before, after))
    old, new = ({row.step: row.metrics for row in read_rows(path)} for path in files)
    if not old:
        return "metrics: there are none to compare with"
    for step in sorted(old.keys() | new.keys()):
        if step not in old or step not in new:
            return f"metrics: only one of the runs has a row at step {step}"
        for name in sorted(old[step].keys() | new[step].keys()):
            one, other = (rows[step].get(name, math.nan) for rows in (old, new))
            same = one == other or (math.isnan(one) and math.isnan(other))
            if not same and not name.startswith(MEASURED):
                return f"metrics: {name} first differs at step {step}: was {one!r}, is {other!r}"
    return f"metrics: {len(old)} rows, identical"


def saved_weights(folder: Path) -> dict[str, Tensor] | None:
    """Return the weights of the newest checkpoint in a folder, on the CPU; None if it has none."""
    from fundamentallm import load_run

    try:
        kept = load_run(folder).model.state_dict()
    except SettingsError:  # were they wrong in another way, the training would say so, too
        return None
    return {name: tensor.cpu() for name, tensor in kept.items()}


def different_weights(old: dict[str, Tensor] | None, new: dict[str, Tensor]) -> str:
    """Tell whether a run ended with the weights that were kept, bit by bit."""
    if old is None:
        return UNSAVED
    for name in dict.fromkeys([*old, *new]):
        if name not in old or name not in new:
            return f"weights: only the {'first' if name in old else 'repeated'} run has {name}"
        if not _same_bits(old[name], new[name].cpu()):
            return f"weights: {name} differs"
    return f"weights: {len(old)} tensors, identical"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    import torch

    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)  # of numbers, NaN would be unlike NaN
