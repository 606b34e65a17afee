"""How far the upload of a run folder is: ``runs.json``. The worker writes it, both processes read.

A run folder may have several MLflow runs: in several stores, or in one store after a fork.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs

from fundamentallm import write_durably

if TYPE_CHECKING:
    from pathlib import Path

FILE = "runs.json"


@attrs.define
class SyncedRun:
    """One MLflow run: the rows of the journal from its first start to the next run's."""

    run_id: str
    experiment_id: str
    store: str
    """The tracking URI without its password."""
    experiment: str
    starts: list[int]
    """Offsets of the ``start`` rows that began or continued it."""
    history: bool
    """Whether it also contains the earlier rows that are still valid."""
    uploaded: int
    """The store has all rows of this run before this offset of the journal."""
    closed: bool = False
    """Whether the end state is set."""
    system_uploaded: int = 0
    """The store has all rows of this run before this offset of ``system.jsonl``."""


class SyncState:
    """The MLflow runs of a run folder, oldest first."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.runs = [SyncedRun(**one) for one in _read(self._path)]

    def save(self) -> None:
        """Write the file durably."""
        write_durably(self._path, json.dumps([attrs.asdict(run) for run in self.runs], indent=1))

    def end_of(self, index: int) -> int | None:
        """Return the offset behind a run's last row; None for the last run."""
        later = self.runs[index + 1 :]
        return later[0].starts[0] if later else None


def uploaded_bytes(folder: Path) -> int:
    """Return how many bytes of the journal are uploaded, or belong to an earlier MLflow run."""
    runs = _read(folder / FILE)
    return max(runs[-1]["uploaded"], runs[-1]["starts"][0]) if runs else 0


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        # A lost file is no loss: each MLflow run has a tag to find it by, and a store takes a point
        # that it already has without doubling it.
        return []
    return runs if isinstance(runs, list) else []
