"""The end of a run: waiting for the store to take the last rows, such that one sees it."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from fundamentallm_mlflow.ledger import shipped

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fundamentallm_mlflow.shipper import Shipper

TASK = "shipping to MLflow"
SILENT_SECONDS = 3.0

log = logging.getLogger("fundamentallm")


class Farewell:
    """The wait for the last rows of the run whose journal is in ``folder``."""

    def __init__(
        self, folder: Path, seconds: float, report: Callable[[str, int, int], None]
    ) -> None:
        self._folder, self._seconds, self._report = folder, seconds, report
        self._began = time.monotonic()
        self._total = 0
        self._told = False

    def wait(self, shipper: Shipper) -> str | None:
        """Let the shipping process end; return what went wrong. The training is done: whatever
        is wrong with the store does not make it a failed one."""
        try:
            left = shipper.finish(self._seconds, self._tell)
        except Exception as error:
            log.debug("mlflow: the end", exc_info=True)
            left = f"{type(error).__name__}: {error}"
        if self._total:
            self._report(TASK, self._total, self._total)
        return left

    def _tell(self) -> None:
        # In bytes; the last of them is not done before the process has ended.
        self._total = self._total or (self._folder / "journal.jsonl").stat().st_size
        self._report(TASK, min(shipped(self._folder), self._total - 1), self._total)
        if not self._told and time.monotonic() - self._began > SILENT_SECONDS:
            self._told = True
            log.info(
                "mlflow: waiting for the store to take the last rows, at most %g seconds",
                self._seconds,
            )
