"""Which MLflow runs a run folder has been, and how far each has got: ``runs.json``."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from pathlib import Path

FILE = "runs.json"


@attrs.define
class Entry:
    """One MLflow run: the rows of the journal from its first start to the next entry's."""

    run_id: str
    experiment_id: str
    place: str
    experiment: str
    starts: list[int]
    """Offsets of the ``start`` rows that began or continued it."""
    history: bool
    """Whether it also holds the rows before, as far as they count."""
    shipped: int
    """The store has all of its rows before this offset."""
    closed: bool = False
    """Whether its end state is set."""
    system: int = 0
    """The store has all that concerns it of ``system.jsonl`` before this offset."""


class Ledger:
    """The entries of a run folder, oldest first."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.entries = [Entry(**one) for one in _read(self._path)]

    def keep(self) -> None:
        """Write the entries, whole or not at all."""
        beside = self._path.with_suffix(".new")
        with beside.open("w", encoding="utf-8") as file:
            json.dump([attrs.asdict(entry) for entry in self.entries], file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self._path)

    def end_of(self, index: int) -> int | None:
        """Return the offset behind an entry's last row; None for the last entry."""
        after = self.entries[index + 1 :]
        return after[0].starts[0] if after else None


def shipped(folder: Path) -> int:
    """Return how much of the journal needs to wait no longer."""
    entries = _read(folder / FILE)
    return max(entries[-1]["shipped"], entries[-1]["starts"][0]) if entries else 0


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        # Where it is lost, the runs are found again by a tag, and get once more what they have.
        return []
    return entries if isinstance(entries, list) else []
