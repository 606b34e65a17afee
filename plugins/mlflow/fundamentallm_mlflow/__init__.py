"""Parameters, metrics and settings of every run in MLflow, without MLflow in the training process.

The training process appends rows to ``mlflow/journal.jsonl`` in the run folder. A child process
(``ship``), the only one that imports mlflow, opens the store and ships what the journal holds.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm import field, gt, hookimpl, plugin

if TYPE_CHECKING:
    from fundamentallm import Outcome, Run
    from fundamentallm_mlflow.journal import Journal
    from fundamentallm_mlflow.shipper import Shipper

log = logging.getLogger("fundamentallm")


@plugin
class Mlflow:
    """Log parameters, metrics and the composed settings to MLflow.

    The start is strict: a store that cannot be opened ends the run with an error. Afterwards
    nothing about the store can stop or slow the training; what it does not take waits in the
    journal.
    """

    tracking_uri: str | None = None
    """The store: ``sqlite:///path.db`` or ``http://host:port``. By default what the environment
    variable MLFLOW_TRACKING_URI says, else ``mlflow.db`` in the folder of the command."""
    experiment: str = "fundamentallm"
    """Name of the experiment, which is made if it does not exist."""
    run_name: str | None = None
    """Name of the MLflow run; by default that of the run."""
    tags: dict[str, str] = field(factory=dict)
    """Tags of your own."""
    start_seconds: float = field(default=30.0, validator=gt(0))
    """How long the store may take to open before the run ends with an error."""
    end_seconds: float = field(default=60.0, validator=gt(0))
    """How long the end of the run waits for the store to take the last rows."""

    def __attrs_post_init__(self) -> None:
        if not self.experiment.strip():
            raise ValueError("experiment: is empty")
        # Not settings, not state: what lives as long as the process.
        self._journal: Journal | None = None
        self._shipper: Shipper | None = None

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Open the store, and make the MLflow run or continue that of the run folder."""
        from fundamentallm_mlflow.facts import parameters, records, tags
        from fundamentallm_mlflow.journal import Journal
        from fundamentallm_mlflow.shipper import Shipper, masked

        if run.rank:
            return
        folder = run.folder.resolve() / "mlflow"
        self._journal = Journal(folder / "journal.jsonl")
        self._journal.append("start")
        uri = absolute(self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"))
        request = {
            "uri": uri,
            "place": masked(uri),
            "time": time.time_ns() // 1_000_000,
            "experiment": self.experiment,
            "name": self.run_name or run.name,
            "parameters": parameters(run, self),
            "tags": tags(run, self.tags),
            "records": records(run),
            "end_seconds": self.end_seconds,
            "parent": os.getpid(),
        }
        self._shipper = Shipper(folder, request, self.start_seconds)
        log.info("mlflow: run %s in %s", self._shipper.run_id, masked(uri))

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """Append the row to the journal."""
        self._append("metrics", step=run.progress.step, metrics=metrics)

    @hookimpl
    def on_train_end(self, run: Run, outcome: Outcome) -> None:
        """Set the end state, and wait for the store to take what is left."""
        error = None if run.error is None else f"{type(run.error).__name__}: {run.error}"
        self._append("end", outcome=outcome, error=error)
        left = self._shipper.finish(self.end_seconds) if self._shipper is not None else None
        if left is not None:
            log.warning("mlflow: %s; the rows are in %s, and continuing the run ships them",
                        left, run.folder / "mlflow")  # fmt: skip
        if self._journal is not None:
            self._journal.close()
        self._journal = self._shipper = None

    def _append(self, kind: str, **facts: Any) -> None:
        if self._journal is None:
            return
        try:
            self._journal.append(kind, **facts)
        except OSError as error:
            log.warning("mlflow: the journal takes no more rows (%s): MLflow shows none from here "
                        "on; the training goes on", error.strerror)  # fmt: skip
            self._journal.close()
            self._journal = None


def absolute(uri: str | None) -> str:
    """Return the URI of the store such that it means the same in every folder."""
    if uri is None:
        uri = "sqlite:///mlflow.db"
    scheme, separator, path = uri.partition(":///")
    if scheme == "sqlite" and separator and path and not path.startswith((":memory:", "file:")):
        return f"sqlite:///{Path.cwd() / path}"
    return uri
