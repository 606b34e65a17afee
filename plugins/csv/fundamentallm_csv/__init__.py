"""Write the metrics of a run as a table of comma-separated values."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fundamentallm import field, hookimpl, plugin
from fundamentallm_csv.table import Table, move_old

if TYPE_CHECKING:
    from fundamentallm import Run


@plugin
class Csv:
    """Append every row of metrics to ``metrics.csv`` in the run folder.

    The columns are ``time`` (Unix, in seconds), ``step``, ``tokens`` (trained on so far) and then
    the metrics in the order in which they first appeared. A new metric adds a column at the end; a
    cell is empty where a row does not have the metric. A run that is resumed or rewound drops the
    rows of the steps that it repeats. A run that starts at step 0 renames an existing table.
    """

    role = "observer"

    _table: Table | None = field(init=False, default=None)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Open the table, and drop the rows of later steps."""
        if run.rank == 0:
            path = run.folder / "metrics.csv"
            if run.progress.step == 0:
                move_old(path)
            # A signal may have prevented the row of the last step. The resumed run logs it first.
            self._table = Table(path, run.progress.logged_step)

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Drop the rows of the steps after the checkpoint."""
        if self._table is not None:
            self._table.reopen(run.progress.step)

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """Append a row to `metrics.csv` in one write; rewrite it first if it needs new columns."""
        if self._table is not None:
            facts = [f"{time.time():.3f}", str(run.progress.step), str(run.progress.tokens)]
            self._table.append(facts, metrics)

    @hookimpl
    def on_train_end(self) -> None:
        """Close `metrics.csv`."""
        if self._table is not None:
            self._table.close()
            self._table = None
