"""Log parameters, metrics and settings of a run to MLflow.

The training process appends rows to ``mlflow/journal.jsonl`` in the run folder and never imports
mlflow. A child process (``worker/``) opens the store and uploads the rows. ``child`` and
``description`` run in the training process, and ``journal``, ``sync_state`` and ``tracking_uri`` in
both. The commands of ``cli`` run in a process of their own: ``mlflow sync`` starts a worker through
``child``, and ``ui`` opens the store itself.
"""

from __future__ import annotations

import logging
import os
import uuid
from typing import TYPE_CHECKING, Any, Literal

from fundamentallm import (
    PluginError,
    StorageError,
    command_line,
    field,
    ge,
    gt,
    hookimpl,
    plugin,
)

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm import Outcome, Run
    from fundamentallm_mlflow.child import Worker
    from fundamentallm_mlflow.journal import Backpressure, Journal

log = logging.getLogger("fundamentallm")


@plugin
class Mlflow:
    """Log parameters, metrics and the composed settings to MLflow.

    A store that cannot be opened at the start ends the run with an error. Later the store can
    neither stop nor slow the training: rows that it does not take wait in the journal.
    """

    role = "observer"

    tracking_uri: str | None = None
    """The store: ``sqlite:///path.db`` or ``http://host:port``. By default the environment variable
    MLFLOW_TRACKING_URI, else ``mlflow.db`` in the working directory."""
    experiment: str = "fundamentallm"
    """Name of the experiment, which is created if it does not exist."""
    run_name: str | None = None
    """Name of the MLflow run; by default the name of the run."""
    tags: dict[str, str] = field(factory=dict)
    """Additional tags of the MLflow run."""
    parent: str | None = None
    """Name of a parent MLflow run that groups several runs, such as those of a sweep; the first of
    them creates it."""
    resume: Literal["auto", "same", "fork", "new"] = "auto"
    """The MLflow run of a resumed run folder: the ``same``; with ``fork`` a new one that has the
    history up to the resumed step and tags for its origin; with ``new`` a new and empty one.
    ``auto`` forks if an older checkpoint was chosen or settings have changed, else it takes the
    same run."""
    on_start_failure: Literal["error", "journal"] = "error"
    """What to do if the store cannot be used at the start: end the run with an error, or write the
    journal until the store is available."""
    start_seconds: float = field(default=30.0, validator=gt(0))
    """Longest wait at the start until the store is open and has the run's description. The time
    counts from before data and model are built."""
    end_seconds: float = field(default=60.0, validator=gt(0))
    """Longest wait at the end of the run until the store has the last rows."""
    waiting_mb: float = field(default=256.0, validator=gt(0))
    """Limit of the rows that wait for an unreachable store. Above half of it only some of the
    training rows are kept; rows with a validation are always kept."""
    system_seconds: float = field(default=10.0, validator=ge(0))
    """Interval between two measurements of CPU, memory and GPUs; 0 turns them off."""
    upload_checkpoints: bool = False
    """Whether to upload the files of checkpoints; otherwise only their paths are logged."""
    registry: str | None = None
    """Name of a registered model. At the end the best remaining checkpoint of the run becomes a
    version of it, and the best version of all runs has the alias ``best``."""
    monitor: str = "val/loss"
    """The metric that decides for ``registry`` which checkpoint is the best."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger ``monitor`` is better."""
    plot: bool = True
    """Whether to plot the losses at the end."""

    def __attrs_post_init__(self) -> None:
        if not self.experiment.strip():
            raise ValueError("experiment: is empty")
        for name, value in (("parent", self.parent), ("registry", self.registry)):
            if value is not None and (not value.strip() or set(value) & set("'\"/:")):
                raise ValueError(f"{name}: {value!r} is empty or contains one of ' \" / :")
        # Neither settings nor state: resources of one process.
        self._journal: Journal | None = None
        self._worker: Worker | None = None
        self._backpressure: Backpressure | None = None
        self._uri = self._charts = ""

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Start the upload worker, which opens the store while data and model are built."""
        from fundamentallm_mlflow.child import Worker
        from fundamentallm_mlflow.tracking_uri import store_of

        if run.rank:  # the first process logs for all
            return
        self._uri = store_of(self.tracking_uri, self._folder(run))
        request = self.request(run.folder, self._uri)
        try:
            self._worker = Worker(self._folder(run), request)
        except OSError as error:
            raise StorageError(f"{error.filename}: cannot be written: {error.strerror}") from error

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Create the MLflow run in the store, or continue that of the run folder."""
        from fundamentallm_mlflow.journal import Backpressure

        worker = self._worker
        if worker is None:
            return
        run.report("opening the MLflow store", 0)
        self._check(run, reply := worker.wait_open(lambda: run.signal is not None))
        # Before the worker is asked to upload: it expects the start row in the journal.
        start = self._write_start(run)
        self._backpressure = Backpressure(self._folder(run), int(self.waiting_mb * 1e6))
        run.report("opening the MLflow store", 1, 1)
        if "error" in reply:
            # Only with ``on_start_failure = "journal"``: the worker continues to try.
            worker.begin_upload()
            return
        self._check(run, reply := worker.attach(), start)
        self._show(run, reply)

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float], validated: bool) -> None:
        """Append the row to the journal."""
        journal, backpressure, worker = self._journal, self._backpressure, self._worker
        if journal is None or backpressure is None or worker is None:
            return
        if backpressure.accepts(journal.size, validated=validated):
            self._append("metrics", step=run.progress.step, metrics=metrics)
        # Each row is an occasion to look at the worker, so no thread has to watch it.
        worker.poll()

    @hookimpl
    def on_rewind(self, run: Run, left: int) -> None:
        """Record that the run went back, which makes the steps in between void."""
        self._append("rewind", step=run.progress.step, left=left)

    @hookimpl
    def on_checkpoint_saved(self, run: Run, folder: Path) -> None:
        """Record a checkpoint, which becomes a logged model with the metrics of its step."""
        # A save may be reported some steps later; the name has the step of its content.
        digits = folder.name.rpartition("-")[2]
        step = int(digits) if digits.isdecimal() else run.progress.step
        self._append("checkpoint", step=step, folder=str(folder.resolve()))

    @hookimpl
    def on_train_end(self, run: Run, outcome: Outcome) -> None:
        """Set the end state, and wait for the upload of the remaining rows."""
        from fundamentallm_mlflow.child import FinalWait

        worker = self._worker
        if worker is None:
            return
        if self._backpressure is None:  # the run ended before its training began
            self._drop_worker()
            return
        error = None if run.error is None else f"{type(run.error).__name__}: {run.error}"
        # Before the wait: the worker reads the end state from the journal, also if this process
        # dies.
        self._end_journal(outcome, error)
        problem = FinalWait(self._folder(run), self.end_seconds, run.report).wait(worker)
        if problem is not None:
            log.warning(
                "mlflow: %s; the rows are in %s; to upload them, resume the run, or: %s",
                problem,
                self._folder(run),
                command_line("mlflow", "sync", run.folder),
            )
        elif self._charts:
            log.info("mlflow: %s", self._charts)
        self._worker = self._backpressure = None

    def request(self, folder: Path, uri: str) -> dict[str, Any]:
        """Return the worker's first command for the run in ``folder``."""
        from fundamentallm_mlflow.tracking_uri import masked

        return {
            "uri": uri,
            "masked_uri": masked(uri),
            "experiment": self.experiment,
            "run_folder": str(folder.resolve()),
            "strict": self.on_start_failure == "error",
            "start_seconds": self.start_seconds,
            "end_seconds": self.end_seconds,
            "system_seconds": self.system_seconds,
            "plot": self.plot,
            "training_pid": os.getpid(),
        }

    def _write_start(self, run: Run) -> int:
        """Open the journal and append the ``start`` row; return its offset."""
        from fundamentallm_mlflow.description import start_of
        from fundamentallm_mlflow.journal import Journal

        path = self._folder(run) / "journal.jsonl"
        try:
            self._journal = Journal(path)
            facts = start_of(run, self, self._uri)
            # By the id the worker finds the MLflow run again if the store's answer was lost.
            return self._journal.append("start", id=uuid.uuid4().hex, **facts)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error

    def _check(self, run: Run, reply: dict[str, Any], start: int | None = None) -> None:
        """End the run if the store cannot be used or a signal came; only warn if that is set."""
        if "error" not in reply or self._worker is None:
            return
        text = self._worker.explain(reply["error"])
        if run.signal is None and self.on_start_failure == "journal":
            log.warning("%s; the rows wait in the journal", text)
            return
        late = run.signal is not None or reply.get("late")
        if late and start is not None:
            # The worker may have created the MLflow run already, which must not stay RUNNING.
            self._end_journal(*(("failed", text) if run.signal is None else ("interrupted", None)))
            self._worker.leave()
            self._worker = self._backpressure = None
        else:
            self._worker.kill()  # first: it must not read the row that is dropped
            if self._journal is not None and start is not None:
                self._journal.drop(start)
            self._drop_worker()
        # A signal ends the run, and there is nothing to save yet.
        raise PluginError(text) if run.signal is None else KeyboardInterrupt

    def _show(self, run: Run, reply: dict[str, Any]) -> None:
        from fundamentallm_mlflow.tracking_uri import charts, is_server, masked

        uri = self._uri
        if "run_id" not in reply:
            return
        how = "" if is_server(uri) else f" (to see them: {command_line('ui', run.folder)})"
        self._charts = f"charts: {charts(uri, reply['experiment_id'])}{how}"
        log.info("mlflow: run %s in %s; %s", reply["run_id"], masked(uri), self._charts)

    def _append(self, kind: str, **facts: Any) -> None:
        if self._journal is None:
            return
        try:
            self._journal.append(kind, **facts)
        except OSError as error:
            log.warning(
                "mlflow: the journal cannot be written (%s): MLflow gets no more rows; the "
                "training continues",
                error.strerror,
            )
            self._journal.close()
            self._journal = None

    def _end_journal(self, outcome: Outcome, error: str | None = None) -> None:
        self._append("end", outcome=outcome, error=error)
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _drop_worker(self) -> None:
        if self._worker is not None:
            self._worker.kill()
        if self._journal is not None:
            self._journal.close()
        self._journal = self._worker = self._backpressure = None

    def _folder(self, run: Run) -> Path:
        """Return the folder of this instance's files."""
        return run.folder.resolve() / run.name_of(self)
