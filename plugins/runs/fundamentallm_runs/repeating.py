"""The command ``rerun``: repeat a run from its record, and say whether it came out the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fundamentallm import SettingsError
from fundamentallm_runs.record import Record, read
from fundamentallm_runs.rows import read_rows

if TYPE_CHECKING:
    from fundamentallm import Run

MEASURED = ("perf/", "system/")


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
    folder = run_dir or run.with_name(f"{run.name}-rerun")
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"{folder}: is not empty; name another with --run-dir")
    made = train(recorded(run, overrides), run_dir=folder)
    after = read(folder)
    for line in versions(before, after):
        click.echo(line)
    told = [different_rows(before, after), different_weights(run, made)]
    for line in told:
        click.echo(line)
    same = all(line.endswith("identical") for line in told)
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


def different_weights(folder: Path, made: Run) -> str:
    """Tell whether a run ended with the weights of the newest checkpoint in a folder."""
    import torch

    from fundamentallm import load_run

    kept = load_run(folder)
    weights = kept.model.state_dict()
    for name, tensor in made.model.state_dict().items():
        if not torch.equal(tensor.cpu(), weights[name].cpu()):
            return f"weights: {name} differs"
    return f"weights: {len(weights)} tensors, identical"
