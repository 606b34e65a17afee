"""Repeat a run from its record, and compare the two runs bit by bit."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from fundamentallm import FundamentalError, SettingsError, StorageError, command_line, folder
from fundamentallm_runs.run_record import Record, named, read

if TYPE_CHECKING:
    from torch import Tensor

    from fundamentallm import Composed, Run

MEASURED = ("perf/", "system/")
UNFINISHED = ("killed", "failed", "interrupted", "running")


@attrs.frozen
class Saved:
    """The newest sound checkpoint of a run, to compare with."""

    step: int
    weights: dict[str, Tensor]
    data: str | None
    """The fingerprint of the training data, if it is recorded."""


@attrs.frozen
class Comparison:
    """The result of comparing the metrics or the weights of the two runs."""

    what: Literal["metrics", "weights"]
    outcome: Literal["identical", "different", "missing"]
    """``missing``: one of the runs has nothing to compare with."""
    text: str


@attrs.frozen
class Result:
    """What a repeated run showed; the lines for people are made from it last."""

    comparisons: tuple[Comparison, ...] = ()
    remarks: tuple[str, ...] = ()
    """What else differs, and what the record does not contain."""
    signal: int | None = None
    """The signal that interrupted the repeated run."""
    step: int = 0
    """The step of the interruption."""

    def of(self, *outcomes: str) -> list[str]:
        """Return what was compared with one of these outcomes."""
        return [one.what for one in self.comparisons if one.outcome in outcomes]

    @property
    def exit_code(self) -> int:
        """0 if something was compared and nothing differs."""
        if self.signal is not None:
            return 128 + self.signal
        return 0 if self.of("identical") and not self.of("different") else 1

    def lines(self) -> list[str]:
        """Return the report."""
        if self.signal is not None:
            return [f"interrupted at step {self.step}: there is nothing to compare yet"]
        compared = [f"{one.what}: {one.text}" for one in self.comparisons]
        return [*self.remarks, *compared, self._verdict()]

    def _verdict(self) -> str:
        same = self.of("identical")
        if self.of("different"):
            return "the run is not reproduced"
        if len(same) == len(self.comparisons):
            return "the run is reproduced"
        if not same:
            return "nothing was compared"
        return f"the {same[0]} are reproduced; nothing else was compared"


def run_again(
    run: Path,
    run_dir: Path | None,
    overrides: Sequence[str] = (),
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
) -> Result:
    """Train a run once more, from its record, into another folder, and compare both.

    ``overrides``, ``add`` and ``remove`` change the recorded settings.
    """
    from fundamentallm import recorded

    before = read(run)
    target = run_dir or named(run).with_name(f"{before.name}-rerun")
    if target.exists() and any(target.iterdir()):
        raise SettingsError(f"{target}: is not empty; name another with --run-dir")
    check_record(before)
    composed = recorded(run, overrides, add=add, remove=remove)
    saved = newest_saved(run)  # before hours are spent
    made, failure = repeated(composed, target, before)
    if made is not None and made.signal is not None:
        return Result(signal=made.signal, step=made.progress.step)
    after = read(target)
    remarks = [*history(before), *environments(before, after), *data_change(saved, made)]
    return Result(
        (compare_rows(before, after), compare_weights(saved, made, before.folder, target)),
        (*([failure] if failure else []), *remarks),
    )


def check_record(before: Record) -> None:
    """Raise a ``SettingsError`` if the record lacks a part of the run."""
    facts = part(before, "plugins")
    given = [
        name
        for name, provenance in facts.items()
        if isinstance(provenance, dict) and provenance.get("kind") == "object"
    ]
    if given:
        command = before.environment.get("command")
        how = f" ({shlex.join(map(str, command))})" if isinstance(command, list) else ""
        raise SettingsError(
            f"{before.folder}: its record is incomplete: {', '.join(given)} came as Python "
            f"objects; start the program that makes them once more{how}, and compare the two runs "
            f"with: {command_line('compare')}"
        )


def repeated(composed: Composed, target: Path, before: Record) -> tuple[Run | None, str | None]:
    """Train once more; return the run, or a line about the error if the first run failed, too."""
    from fundamentallm import train

    try:
        return train(composed, run_dir=target), None
    except FundamentalError as error:
        if before.state != "failed":
            raise
        return None, f"the run fails again: {error}"


def part(record: Record, name: str) -> dict[str, Any]:
    """Return a table of the recorded environment; an empty one if there is none."""
    found = record.environment.get(name)
    return found if isinstance(found, dict) else {}


def history(before: Record) -> list[str]:
    """Return a line for everything that the record cannot show of the run."""
    lines = []
    first = min(before.columns.times, default=math.inf)
    if first < before.started:
        lines.append(
            "the run was continued: the settings and versions of before that, if they "
            "were others, are not in its record"
        )
    if before.state in UNFINISHED:
        lines.append(
            f"the run did not come to its end ({before.state}): it is compared up to "
            f"step {before.last_row}"
        )
    return [*lines, *replaced_code(before)]


def replaced_code(before: Record) -> list[str]:
    """Return a line for each local file that the run used only until one of its resumes."""
    return [
        f"{path.relative_to(parent)}: was changed or removed at step {int(parent.name[-8:])} of "
        f"the run; the version until then is {path}"
        for parent in sorted((before.folder / folder.CODE).glob("until-step-" + "[0-9]" * 8))
        for path in sorted(parent.rglob("*"))
        if path.is_file()
    ]


def environments(before: Record, after: Record) -> list[str]:
    """Return a line for each version, machine fact and local file that differs."""
    if not before.environment:
        return ["versions: the run has no record of them"]
    lines = []
    for table in ("versions", "plugins"):
        old, new = (part(one, table) for one in (before, after))
        lines += [
            f"{name}: was {_shown(old.get(name))}, is {_shown(new.get(name))}"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
        ]
    lines += changed_code(before, after)
    for fact in ("python", "platform", "host", "processor", "threads"):
        was, now = (one.environment.get(fact, "absent") for one in (before, after))
        lines += [f"{fact}: was {was}, is {now}"] if was != now else []
    return lines


def changed_code(before: Record, after: Record) -> list[str]:
    """Return a line for each local file of the run that is no longer what it was."""
    old, new = (part(one, "code") for one in (before, after))
    lines = []
    for path in sorted({*old, *new}):
        was, now = (table.get(path) for table in (old, new))
        if not isinstance(was, dict):
            lines.append(f"{path}: is used by the repeated run only")
        elif not isinstance(now, dict):
            lines.append(f"{path}: is used by the first run only")
        elif was.get("sha256") != now.get("sha256"):
            copy = before.folder / str(was.get("copy"))
            lines.append(f"{path}: has changed since the run; the old version is {copy}")
    return lines


def _shown(provenance: Any) -> str:
    """Return a version, or a plugin's provenance, as text."""
    if not isinstance(provenance, dict):
        return "absent" if provenance is None else str(provenance)
    words = (provenance.get("name"), provenance.get("version"))
    return " ".join(str(word) for word in words if word)


def data_change(saved: Saved | None, made: Run | None) -> list[str]:
    """Return a line if the data have another fingerprint than those of the first run."""
    if saved is None or made is None or saved.data in (None, made.data.fingerprint):
        return []
    was, now = str(saved.data)[:12], made.data.fingerprint[:12]
    return [f"data: are not what they were: their fingerprint was {was}, is {now}"]


def compare_rows(before: Record, after: Record) -> Comparison:
    """Compare the logged metrics, except measurements of time and memory."""
    last = before.last_row if before.state in UNFINISHED else math.inf
    old, new = (
        {row.step: row.metrics for row in folder.rows(one.folder) if row.step <= last}
        for one in (before, after)
    )
    if not old:
        return Comparison("metrics", "missing", "there are none to compare with")
    for step in sorted(old.keys() | new.keys()):
        if step not in old or step not in new:
            which = "first" if step in old else "repeated"
            text = f"only the {which} run has a row at step {step}"
            return Comparison("metrics", "different", text)
        for name in sorted(old[step].keys() | new[step].keys()):
            one, other = (repr(rows[step].get(name, "absent")) for rows in (old, new))
            if one != other and not name.startswith(MEASURED):
                text = f"{name} first differs at step {step}: was {one}, is {other}"
                return Comparison("metrics", "different", text)
    return Comparison("metrics", "identical", f"{len(old)} rows, identical")


def newest_saved(path: Path) -> Saved | None:
    """Return the newest sound checkpoint of the run folder; None if there is none.

    Raises ``StorageError`` if there are checkpoints, but none is sound.
    """
    home = path / folder.CHECKPOINTS
    found = [one for one in folder.checkpoints(path) if one.folder.parent == home]
    for one in reversed(found):
        try:
            weights = weights_at(path, one.folder.name)
        except StorageError:
            if one is found[0]:
                raise
            continue
        return None if weights is None else Saved(one.step, weights, one.data or None)
    return None


def weights_at(path: Path, checkpoint: str) -> dict[str, Tensor] | None:
    """Return the weights of a checkpoint, on the CPU; None if it cannot be loaded."""
    from fundamentallm import load_run

    try:
        weights = load_run(path, at=checkpoint).model.state_dict()
    except SettingsError:  # other mistakes in the settings end the training, too
        return None
    return {name: tensor.cpu() for name, tensor in weights.items()}


def compare_weights(
    saved: Saved | None, made: Run | None, before: Path, target: Path
) -> Comparison:
    """Compare the saved weights with those of the repeated run at the same step."""
    if saved is None and (before / folder.ELSEWHERE).is_file():
        text = "they are in another folder; there are none here to compare with"
        return Comparison("weights", "missing", text)
    if saved is None:
        return Comparison("weights", "missing", "none were saved to compare with")
    if made is not None and made.progress.step == saved.step:
        return different_weights(saved.weights, made.model.state_dict())
    name = f"step-{saved.step:08}"
    there = weights_at(target, name) if (target / folder.CHECKPOINTS / name).is_dir() else None
    if there is None:
        text = f"the repeated run has kept none of step {saved.step} to compare with"
        return Comparison("weights", "missing", text)
    return different_weights(saved.weights, there)


def different_weights(old: dict[str, Tensor], new: dict[str, Tensor]) -> Comparison:
    """Compare weights bit by bit."""
    for name in dict.fromkeys([*old, *new]):
        if name not in old or name not in new:
            text = f"only the {'first' if name in old else 'repeated'} run has {name}"
            return Comparison("weights", "different", text)
        if not _same_bits(old[name], new[name].cpu()):
            return Comparison("weights", "different", f"{name} differs")
    return Comparison("weights", "identical", f"{len(old)} tensors, identical")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    import torch

    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)  # as numbers, NaN would differ from NaN
