"""Decide which MLflow run a resumed run folder writes to."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fundamentallm_mlflow.journal import JournalReader, Timeline

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Decision: TypeAlias = Literal["same", "fork", "new"]

# These settings change how long a run is, what is measured and where, but not what is trained.
FREE = (
    "run.length",
    "run.validate_every",
    "run.log_every",
    "run.max_time",
    "run.device",
    "run.validate_first",
)


def decide(journal: Path, offset: int, start: Mapping[str, Any]) -> tuple[Decision, str]:
    """Return how the ``start`` row at ``offset`` continues the last run, and why."""
    if start["resume"] != "auto":
        return start["resume"], f'resume = "{start["resume"]}"'
    newest = newest_checkpoint(journal, offset)
    if start["chose_checkpoint"] and start["step"] < newest:
        return "fork", f"continued from step {start['step']}, though step {newest} was saved"
    before = previous_start(journal, offset)
    changed = changes(before["parameters"], start["parameters"]) if before else []
    binding = [line for name, line in changed if not any(fnmatchcase(name, p) for p in FREE)]
    return ("fork", "; ".join(binding)) if binding else ("same", "")


def changes(old: Mapping[str, str], new: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the settings that differ, each with a line that says how."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [(n, f"{n}: {old.get(n, 'not set')} -> {new.get(n, 'not set')}") for n in names]


def previous_start(journal: Path, offset: int) -> dict[str, Any] | None:
    """Return the last ``start`` row before ``offset``."""
    found = None
    for _, row in JournalReader(journal, stop=offset).rows():
        found = row if row["kind"] == "start" else found
    return found


def newest_checkpoint(journal: Path, offset: int) -> int:
    """Return the step of the newest valid checkpoint before ``offset``; -1 if there is none."""
    # Without the start at ``offset``, which may itself go back.
    before = Timeline(journal, offset - 1)
    steps = [
        row["step"]
        for at, row in JournalReader(journal, stop=offset).rows()
        if row["kind"] == "checkpoint" and before.is_valid(at, row["step"])
    ]
    return max(steps, default=-1)
