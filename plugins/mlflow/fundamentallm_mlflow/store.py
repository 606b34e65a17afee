"""The MLflow store, as the shipping process sees it. Nothing else imports mlflow."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mlflow import MlflowClient, MlflowException
from mlflow.entities import Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# Key, value, milliseconds since 1970, step.
Point: TypeAlias = tuple[str, float, int, int]

METRICS_PER_BATCH = 1000
ENTRIES_PER_BATCH = 100
STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "interrupted": "KILLED"}

log = logging.getLogger("ship")


class Store:
    """One MLflow run: made for the run folder, or found again by what ``run.json`` there says."""

    def __init__(self, request: Mapping[str, Any], folder: Path) -> None:
        self._note = folder / "run.json"
        self._place = {"uri": request["place"], "experiment": request["experiment"]}
        with locked(request["uri"]):
            self._client = MlflowClient(request["uri"], registry_uri=request["uri"])
            experiment = self._experiment(request)
        known = self._known()
        self.offset = known["offset"] if known else 0
        self.run_id = known["run_id"] if known else self._new_run(experiment, request)
        self.keep(self.offset)
        self._describe(request)

    def take(self, points: Sequence[Point]) -> None:
        """Log metrics. A batch that MLflow refuses for what it is, it refuses whole: halve it
        until the bad one is alone, and leave that out."""
        for first in range(0, len(points), METRICS_PER_BATCH):
            batch = points[first : first + METRICS_PER_BATCH]
            try:
                self._client.log_batch(self.run_id, [_metric(*p) for p in batch], synchronous=True)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                if len(batch) == 1:
                    log.warning("left out %s: %s", batch[0], error)
                    continue
                self.take(batch[: len(batch) // 2])
                self.take(batch[len(batch) // 2 :])

    def keep(self, offset: int) -> None:
        """Note how far into the journal the store is."""
        beside = self._note.with_suffix(".new")
        beside.write_text(json.dumps(self._place | {"run_id": self.run_id, "offset": offset}))
        beside.replace(self._note)

    def end(self, last: Mapping[str, Any]) -> None:
        """Set the end state by the last ``start`` or ``end`` row of the journal."""
        outcome = last.get("outcome") or "killed"
        error = last.get("error")
        if outcome == "killed":
            error = "the training process ended without a word (kill -9, out of memory, power)"
        self._client.set_tag(self.run_id, "outcome", outcome)
        if error:
            self._client.set_tag(self.run_id, "error", error)
        self._client.set_terminated(self.run_id, STATUS.get(outcome, "FAILED"), last.get("time"))

    def _experiment(self, request: Mapping[str, Any]) -> str:
        name = request["experiment"]
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return self._client.create_experiment(name, _artifacts(request["uri"], name))
            except MlflowException as error:  # somebody else made it just now
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise error from None
        if found.lifecycle_stage != "active":
            raise ValueError(f"the experiment {name!r} was deleted there: restore it, or set "
                             "mlflow.experiment to another name")  # fmt: skip
        return str(found.experiment_id)

    def _known(self) -> dict[str, Any] | None:
        try:
            known: dict[str, Any] = json.loads(self._note.read_text())
        except FileNotFoundError:
            return None
        if {key: known[key] for key in self._place} != self._place:
            return None
        try:
            found = self._client.get_run(known["run_id"])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return known if found.info.lifecycle_stage == "active" else None

    def _new_run(self, experiment: str, request: Mapping[str, Any]) -> str:
        run = self._client.create_run(experiment, request["time"], run_name=request["name"])
        return str(run.info.run_id)

    def _describe(self, request: Mapping[str, Any]) -> None:
        """Log parameters, tags and files; of a continued run, what is new or has changed."""
        run = self._client.get_run(self.run_id)
        wanted = {safe(key): value for key, value in request["parameters"].items()}
        tags = {safe(key): value for key, value in request["tags"].items()} | _changes(run, wanted)
        fresh = [Param(k, v) for k, v in wanted.items() if k not in run.data.params]
        for part in _parts(fresh):
            self._client.log_batch(self.run_id, params=part, synchronous=True)
        for part in _parts([RunTag(k, v) for k, v in tags.items()]):
            self._client.log_batch(self.run_id, tags=part, synchronous=True)
        for key in {"outcome", "error"} & set(run.data.tags):
            self._client.delete_tag(self.run_id, key)
        for path in request["records"]:
            self._client.log_artifact(self.run_id, path)
        self._client.update_run(self.run_id, status="RUNNING")


@contextlib.contextmanager
def locked(uri: str) -> Iterator[None]:
    """Keep other runs out while the store opens: two that make the tables of one fresh sqlite
    database at the same time can ruin it."""
    path = database(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def database(uri: str) -> Path | None:
    """Return the file of a sqlite store; None for a store of another kind."""
    scheme, separator, path = uri.partition(":///")
    return Path(path) if separator and scheme == "sqlite" and path else None


def safe(key: str) -> str:
    """Return a key as MLflow takes it: few characters, and the form of a plain relative path."""
    allowed = re.sub(r"[^\w./ :-]", "_", key, flags=re.ASCII)
    return posixpath.normpath(allowed).lstrip("/.") or "_"


def _metric(key: str, value: float, milliseconds: int, step: int) -> Metric:
    # MLflow stores an infinity as the largest float, which ruins the axis of every plot.
    return Metric(safe(key), value if math.isfinite(value) else math.nan, milliseconds, step)


def _changes(run: MlflowRun, wanted: Mapping[str, str]) -> dict[str, str]:
    """Tell in a tag what MLflow refuses to change in the parameters."""
    kept = run.data.params
    lines = [f"{k}: {kept[k]} -> {v}" for k, v in wanted.items() if kept.get(k, v) != v]
    return {"settings.changed": "\n".join(lines)} if lines else {}


def _parts(entries: list[Any]) -> Iterator[list[Any]]:
    for first in range(0, len(entries), ENTRIES_PER_BATCH):
        yield entries[first : first + ENTRIES_PER_BATCH]


def _artifacts(uri: str, experiment: str) -> str | None:
    """Return where the files of an experiment go: beside a sqlite database, wherever the command
    was run; a server knows its own place."""
    path = database(uri)
    name = re.sub(r"[^\w.-]+", "_", experiment, flags=re.ASCII)
    return None if path is None else (path.parent / "mlartifacts" / name).as_uri()
