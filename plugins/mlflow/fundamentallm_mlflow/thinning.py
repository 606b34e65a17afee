"""A bound for what waits while the store is away: rows are thinned, validations never lost."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fundamentallm_mlflow.ledger import shipped

if TYPE_CHECKING:
    from pathlib import Path

LOOKS = 64  # how often the rest is measured while the journal grows by what may wait
log = logging.getLogger("fundamentallm")


class Thinning:
    """Decides which rows are written once more than half of ``limit`` bytes is waiting.

    The share of rows that are written halves whenever the room that is left does, so that what is
    missing is spread over the whole outage. Rows with a validation are always written.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._next_look = 0
        self._every = 1
        self._row = 0
        self._told = False

    def passes(self, size: int, *, validated: bool) -> bool:
        """Tell whether a row belongs into the journal, which has ``size`` bytes now."""
        if size >= self._next_look:
            self._look(size)
        self._row += 1
        return validated or not self._row % self._every

    def _look(self, size: int) -> None:
        self._next_look = size + max(1, self._limit // LOOKS)
        room = 1 - (size - shipped(self._folder)) / self._limit
        self._every = 1
        while room <= 0.5 / self._every and self._every < 1 << 20:
            self._every *= 2
        if self._every > 1 and not self._told:
            self._told = True
            log.warning(
                "mlflow: %d MB wait for the store: from here on MLflow gets fewer of the "
                "training rows, and all validations",
                self._limit >> 21,
            )
