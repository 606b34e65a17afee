"""Parameters, metrics and settings of every run in MLflow, without MLflow in the training process.

The training process appends rows to ``mlflow/journal.jsonl`` in the run folder. A child process
(``ship``), the only one that imports mlflow, opens the store and ships what the journal holds.
"""

from __future__ import annotations

import logging
import os
import uuid
from typing import TYPE_CHECKING, Any, Literal

from fundamentallm import PluginError, StorageError, field, ge, gt, hookimpl, plugin

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm import Outcome, Run
    from fundamentallm_mlflow.journal import Journal
    from fundamentallm_mlflow.shipper import Shipper
    from fundamentallm_mlflow.thinning import Thinning

log = logging.getLogger("fundamentallm")


@plugin
class Mlflow:
    """Log parameters, metrics and the composed settings to MLflow.

    The start is strict: a store that cannot be opened ends the run with an error. Afterwards
    nothing about the store can stop or slow the training; what it does not take waits in the
    journal.
    """

    role = "observer"

    tracking_uri: str | None = None
    """The store: ``sqlite:///path.db`` or ``http://host:port``. By default what the environment
    variable MLFLOW_TRACKING_URI says, else ``mlflow.db`` in the folder of the command."""
    experiment: str = "fundamentallm"
    """Name of the experiment, which is made if it does not exist."""
    run_name: str | None = None
    """Name of the MLflow run; by default that of the run."""
    tags: dict[str, str] = field(factory=dict)
    """Tags of your own."""
    parent: str | None = None
    """Name of an MLflow run that this one belongs to with others, such as those of a sweep; the
    first of them makes it."""
    resume: Literal["auto", "same", "fork", "new"] = "auto"
    """Which MLflow run a continued run folder writes into: the same; a new one with the history up
    to there and a tag that says where it comes from; or a new and empty one. ``auto`` forks where
    an older checkpoint was asked for or settings have changed, and else stays in the same."""
    on_start_failure: Literal["error", "journal"] = "error"
    """What happens if the store cannot be used at the start: the run ends with an error, or it
    writes its journal until the store is there."""
    start_seconds: float = field(default=30.0, validator=gt(0))
    """How long the start waits for the store to open and to take the run's description; it begins
    to open before data and model are built."""
    end_seconds: float = field(default=60.0, validator=gt(0))
    """How long the end of the run waits for the store to take the last rows."""
    waiting_mb: float = field(default=256.0, validator=gt(0))
    """How much may wait for a store that is away. Above half of it training rows are thinned;
    validations are kept in any case."""
    system_seconds: float = field(default=10.0, validator=ge(0))
    """How often to look at CPU, memory and GPUs; 0 is never."""
    upload_checkpoints: bool = False
    """Whether the files of checkpoints are copied into the store, and not only their places."""
    registry: str | None = None
    """Name of a registered model: at the end the best checkpoint that is left of the run becomes a
    version of it, and its alias ``best`` goes to the best version of all runs."""
    monitor: str = "val/loss"
    """The metric that tells the best for ``registry``."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger ``monitor`` is better."""
    plot: bool = True
    """Whether a picture of the losses is made at the end."""

    def __attrs_post_init__(self) -> None:
        if not self.experiment.strip():
            raise ValueError("experiment: is empty")
        for name, value in (("parent", self.parent), ("registry", self.registry)):
            if value is not None and (not value.strip() or set(value) & set("'\"/:")):
                raise ValueError(f"{name}: {value!r} is empty or holds one of ' \" / :")
        # Not settings, not state: what lives as long as the process.
        self._journal: Journal | None = None
        self._shipper: Shipper | None = None
        self._thinning: Thinning | None = None
        self._validated = False
        self._uri = self._shown = ""

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Begin to open the store, which takes seconds, while data and model are built."""
        from fundamentallm_mlflow.places import settled
        from fundamentallm_mlflow.shipper import Shipper

        if run.rank:
            return
        self._uri = settled(self.tracking_uri, self._folder(run))
        request = self.request(run.folder, self._uri)
        try:
            self._shipper = Shipper(self._folder(run), request)
        except OSError as error:
            raise StorageError(f"{error.filename}: cannot be written: {error.strerror}") from error

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Make the MLflow run in the store, or continue that of the run folder."""
        from fundamentallm_mlflow.facts import start_of
        from fundamentallm_mlflow.journal import Journal
        from fundamentallm_mlflow.thinning import Thinning

        shipper, folder = self._shipper, self._folder(run)
        if shipper is None:
            return
        if run.rank:  # only now is it known that another process logs for all
            self._drop_shipper()
            return
        run.report("opening the MLflow store", 0)
        self._check(run, answer := shipper.open(lambda: run.signal is not None))
        try:
            self._journal = journal = Journal(folder / "journal.jsonl")
            start = journal.append("start", id=uuid.uuid4().hex, **start_of(run, self, self._uri))
        except OSError as error:
            path = folder / "journal.jsonl"
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
        self._thinning = Thinning(folder, int(self.waiting_mb * 1e6))
        run.report("opening the MLflow store", 1, 1)
        if "error" in answer:
            shipper.go_on()
            return
        self._check(run, answer := shipper.attach(), start)
        self._show(run, answer)

    @hookimpl
    def on_validation_end(self, run: Run) -> None:
        """Mark the coming row as one that is never left out."""
        self._validated = True

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """Append the row to the journal."""
        journal, thinning, shipper = self._journal, self._thinning, self._shipper
        if journal is None or thinning is None or shipper is None:
            return
        if thinning.passes(journal.size, validated=self._validated):
            self._append("metrics", step=run.progress.step, metrics=metrics)
        self._validated = False
        shipper.listen()

    @hookimpl
    def on_rewind(self, run: Run, left: int) -> None:
        """Tell that the steps that were left are void."""
        self._append("rewind", step=run.progress.step, left=left)

    @hookimpl
    def on_checkpoint_saved(self, run: Run, folder: Path) -> None:
        """Tell of a checkpoint, which becomes a logged model with the metrics of its step."""
        digits = folder.name.rpartition("-")[2]
        step = int(digits) if digits.isdecimal() else run.progress.step
        self._append("checkpoint", step=step, folder=str(folder.resolve()))

    @hookimpl
    def on_train_end(self, run: Run, outcome: Outcome) -> None:
        """Set the end state, and wait for the store to take what is left."""
        from fundamentallm_mlflow.farewell import Farewell

        shipper = self._shipper
        if shipper is None:
            return
        if self._thinning is None:  # the run ended before its start was told
            self._drop_shipper()
            return
        error = None if run.error is None else f"{type(run.error).__name__}: {run.error}"
        self._append("end", outcome=outcome, error=error)
        if self._journal is not None:
            self._journal.close()
        left = Farewell(self._folder(run), self.end_seconds, run.report).wait(shipper)
        if left is not None:
            log.warning(
                "mlflow: %s; the rows are in %s: continuing the run ships them, or: "
                "fundamentallm mlflow sync %s",
                left,
                self._folder(run),
                run.folder,
            )
        elif self._shown:
            log.info("mlflow: %s", self._shown)
        self._journal = self._shipper = self._thinning = None

    def request(self, folder: Path, uri: str) -> dict[str, Any]:
        """Return what the shipping process is told about the run in ``folder``."""
        from fundamentallm_mlflow.places import masked

        return {
            "uri": uri,
            "place": masked(uri),
            "experiment": self.experiment,
            "run_folder": str(folder.resolve()),
            "strict": self.on_start_failure == "error",
            "start_seconds": self.start_seconds,
            "end_seconds": self.end_seconds,
            "system_seconds": self.system_seconds,
            "plot": self.plot,
            "parent": os.getpid(),
        }

    def _check(self, run: Run, answer: dict[str, Any], start: int | None = None) -> None:
        """End the run because of a store that cannot be used, or warn of it."""
        if "error" not in answer or self._shipper is None:
            return
        said = self._shipper.why(answer["error"])
        if run.signal is None and self.on_start_failure == "journal":
            log.warning("%s; the rows wait in the journal", said)
            return
        self._shipper.kill()  # first: it is not to read what is dropped
        if self._journal is not None and start is not None:
            self._journal.drop(start)
        self._drop_shipper()
        # A signal asks for the end, and there is nothing to save yet.
        raise PluginError(said) if run.signal is None else KeyboardInterrupt

    def _show(self, run: Run, answer: dict[str, Any]) -> None:
        from fundamentallm_mlflow.places import charts, is_server, masked

        uri = self._uri
        if "run_id" not in answer:
            return
        how = "" if is_server(uri) else f" (once 'fundamentallm ui {run.folder}' runs)"
        self._shown = f"charts: {charts(uri, answer['experiment_id'])}{how}"
        log.info("mlflow: run %s in %s; %s", answer["run_id"], masked(uri), self._shown)

    def _append(self, kind: str, **facts: Any) -> None:
        if self._journal is None:
            return
        try:
            self._journal.append(kind, **facts)
        except OSError as error:
            log.warning(
                "mlflow: the journal takes no more rows (%s): MLflow shows none from here "
                "on; the training goes on",
                error.strerror,
            )
            self._journal.close()
            self._journal = None

    def _drop_shipper(self) -> None:
        if self._shipper is not None:
            self._shipper.kill()
        if self._journal is not None:
            self._journal.close()
        self._journal = self._shipper = self._thinning = None

    def _folder(self, run: Run) -> Path:
        """Return where this instance keeps its files: each has its own."""
        name = next(name for name, instance in run.plugins.items() if instance is self)
        return run.folder.resolve() / name
