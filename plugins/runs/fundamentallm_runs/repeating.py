"""The command ``rerun``: repeat a run from its record, and say whether it came out the same."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from fundamentallm import FundamentalError, SettingsError, StorageError
from fundamentallm_runs.record import Record, named, read
from fundamentallm_runs.rows import read_rows

if TYPE_CHECKING:
    from torch import Tensor

    from fundamentallm import Composed, Run

MEASURED = ("perf/", "system/")
SHORT = ("cut", "failed", "interrupted", "running")  # states of a run that has not come to its end
UNSAVED = "weights: none were saved to compare with"


@attrs.frozen
class Kept:
    """What the newest checkpoint of a run holds to compare with."""

    step: int
    weights: dict[str, Tensor]
    data: str | None
    """The fingerprint of the data that were trained on, if it is told."""


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--run-dir", type=click.Path(path_type=Path, file_okay=False), help="[default: RUN-rerun]"
)
@click.option("--set", "overrides", multiple=True, help="table.key=value, as in TOML.")
@click.pass_context
def rerun(
    context: click.Context, run: Path, run_dir: Path | None, overrides: tuple[str, ...]
) -> None:
    """Repeat RUN from step 0, and compare weights and metrics bit by bit.

    Ends with exit code 1 if they differ.
    """
    from fundamentallm import recorded

    before = read(run)
    folder = run_dir or named(run).with_name(f"{before.name}-rerun")
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"{folder}: is not empty; name another with --run-dir")
    check_record(before)
    composed, kept = recorded(run, overrides), saved(run)  # before hours are spent
    made = repeated(composed, folder, before)
    if made is not None and made.signal is not None:
        click.echo(f"interrupted at step {made.progress.step}: there is nothing to compare yet")
        context.exit(128 + made.signal)
    after = read(folder)
    told = [different_rows(before, after), weights_told(kept, made, before.folder, folder)]
    for line in [*history(before), *versions(before, after), *data_told(kept, made), *told]:
        click.echo(line)
    click.echo(judgement(told))
    if any(line.endswith("identical") for line in told) and not differs(told):
        return
    context.exit(1)


def differs(told: list[str]) -> bool:
    """Whether anything that was compared is not the same."""
    return any(not line.endswith(("identical", "to compare with")) for line in told)


def judgement(told: list[str]) -> str:
    """Return what the lines on metrics and weights say together."""
    same = [line.partition(":")[0] for line in told if line.endswith("identical")]
    if differs(told):
        return "the run is not reproduced"
    if len(same) == len(told):
        return "the run is reproduced"
    rest = "nothing else was compared"
    return f"the {same[0]} are reproduced; {rest}" if same else "nothing was compared"


def check_record(before: Record) -> None:
    """Raise a ``SettingsError`` if the record lacks a part of the run."""
    given = [
        name
        for name, told in part(before, "plugins").items()
        if str(told).endswith("given as an object")
    ]
    if given:
        command = before.environment.get("command")
        how = f" ({shlex.join(map(str, command))})" if isinstance(command, list) else ""
        raise SettingsError(
            f"{before.folder}: its record does not hold all of it: {', '.join(given)} came as "
            f"Python objects; start the program that gives them once more{how}, and compare the "
            f"two runs with 'fundamentallm compare'"
        )


def repeated(composed: Composed, folder: Path, before: Record) -> Run | None:
    """Train once more; None if that fails as the first run has failed."""
    from fundamentallm import train

    try:
        return train(composed, run_dir=folder)
    except FundamentalError as error:
        if before.state != "failed":
            raise
        click.echo(f"the run fails again: {error}")
        return None


def part(record: Record, name: str) -> dict[str, Any]:
    """Return a table of what is recorded of the environment; an empty one if it is none."""
    found = record.environment.get(name)
    return found if isinstance(found, dict) else {}


def history(before: Record) -> list[str]:
    """Return a line for everything that the record cannot tell of the run."""
    lines = []
    first = min(before.columns.times, default=math.inf)
    if first < before.started:
        lines.append(
            "the run was continued: the settings and versions of before that, if they "
            "were others, are not in its record"
        )
    if before.state in SHORT:
        lines.append(
            f"the run did not come to its end ({before.state}): it is compared up to "
            f"step {before.step}"
        )
    return lines


def versions(before: Record, after: Record) -> list[str]:
    """Return a line for everything that the two runs did not have in common."""
    if not before.environment:
        return ["versions: the run has no record of them"]
    lines = []
    for table in ("versions", "plugins"):
        old, new = (part(one, table) for one in (before, after))
        lines += [
            f"{name}: was {old.get(name, 'absent')}, is {new.get(name, 'absent')}"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
    for fact in ("python", "platform", "host", "processor", "threads"):
        was, now = (one.environment.get(fact, "absent") for one in (before, after))
        lines += [f"{fact}: was {was}, is {now}"] if was != now else []
    return lines


def data_told(kept: Kept | None, made: Run | None) -> list[str]:
    """Return a line if the data are no longer what they were."""
    if kept is None or made is None or kept.data in (None, made.data.fingerprint):
        return []
    was, now = str(kept.data)[:12], made.data.fingerprint[:12]
    return [f"data: are not what they were: their fingerprint was {was}, is {now}"]


def different_rows(before: Record, after: Record) -> str:
    """Tell whether both runs logged the same, measurements of time and memory aside."""
    last = before.step if before.state in SHORT else math.inf
    files = (one.folder / "metrics.jsonl" for one in (before, after))
    old, new = (
        {row.step: row.metrics for row in read_rows(path) if row.step <= last} for path in files
    )
    if not old:
        return "metrics: there are none to compare with"
    for step in sorted(old.keys() | new.keys()):
        if step not in old or step not in new:
            which = "first" if step in old else "repeated"
            return f"metrics: only the {which} run has a row at step {step}"
        for name in sorted(old[step].keys() | new[step].keys()):
            one, other = (repr(rows[step].get(name, "absent")) for rows in (old, new))
            if one != other and not name.startswith(MEASURED):
                return f"metrics: {name} first differs at step {step}: was {one}, is {other}"
    return f"metrics: {len(old)} rows, identical"


def saved(folder: Path) -> Kept | None:
    """Return what the newest sound checkpoint in a folder holds; None if there is none."""
    every = sorted((folder / "checkpoints").glob("step-*/manifest.json"), reverse=True)
    found = [one for one in every if one.parent.name.removeprefix("step-").isdecimal()]
    for manifest in found:
        try:
            weights = weights_at(folder, manifest.parent.name)
        except StorageError:
            if manifest is found[-1]:
                raise
            continue
        step = int(manifest.parent.name.removeprefix("step-"))
        return None if weights is None else Kept(step, weights, _data_of(manifest))
    return None


def weights_at(folder: Path, checkpoint: str) -> dict[str, Tensor] | None:
    """Return the weights of a checkpoint, on the CPU; None if there is none of that name."""
    from fundamentallm import load_run

    try:
        weights = load_run(folder, at=checkpoint).model.state_dict()
    except SettingsError:  # were they wrong in another way, the training would say so, too
        return None
    return {name: tensor.cpu() for name, tensor in weights.items()}


def _data_of(manifest: Path) -> str | None:
    try:
        told = json.loads(manifest.read_text("utf-8"))["data"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return told if isinstance(told, str) else None


def weights_told(kept: Kept | None, made: Run | None, before: Path, folder: Path) -> str:
    """Tell whether the repeated run had the weights that were kept when it was as far as that."""
    if kept is None and (before / "checkpoint-folders").is_file():
        return "weights: they are in another folder; there are none here to compare with"
    if kept is None:
        return UNSAVED
    if made is not None and made.progress.step == kept.step:
        return different_weights(kept.weights, made.model.state_dict())
    name = f"step-{kept.step:08}"
    there = weights_at(folder, name) if (folder / "checkpoints" / name).is_dir() else None
    if there is None:
        return f"weights: the repeated run has kept none of step {kept.step} to compare with"
    return different_weights(kept.weights, there)


def different_weights(old: dict[str, Tensor], new: dict[str, Tensor]) -> str:
    """Tell whether weights are the same, bit by bit."""
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
