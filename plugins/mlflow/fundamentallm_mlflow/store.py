"""The MLflow store, as the shipping process sees it. Nothing else imports mlflow."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mlflow import MlflowClient, MlflowException
from mlflow.entities import (
    Dataset,
    DatasetInput,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    RunTag,
)

from fundamentallm_mlflow import sweeps
from fundamentallm_mlflow.database import artifacts, locked
from fundamentallm_mlflow.names import LONGEST, Names, model_name, safe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mlflow.entities import LoggedModel
    from mlflow.entities import Run as MlflowRun

# Key, value, milliseconds since 1970, step.
Point: TypeAlias = tuple[str, float, int, int]

METRICS_PER_BATCH = 1000
ENTRIES_PER_BATCH = 100
LONGEST_PARAMETER, LONGEST_TAG = 6000, 8000
LONGEST_SOURCE, LONGEST_SOURCE_VALUE = 65_535, 1000
STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "interrupted": "KILLED"}
START_TAG = "fundamentallm.start"
NOTE = "mlflow.note.content"

log = logging.getLogger("ship")


class Store:
    """An open store with the experiment, which is made if it is not there."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri
        with locked(uri):
            self.client = MlflowClient(uri, registry_uri=uri)
            self.experiment_id = self._experiment(experiment)

    def has(self, run_id: str) -> bool:
        """Tell whether a run is there and was not deleted."""
        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def run_for(self, start: Mapping[str, Any]) -> str:
        """Return the run that was made for a ``start`` row, now or by a call that got no answer."""
        query = f"tags.`{START_TAG}` = '{start['id']}'"
        found = self.client.search_runs([self.experiment_id], query, max_results=1)
        run = (
            found[0]
            if found
            else self.client.create_run(
                self.experiment_id,
                start["time"],
                {START_TAG: start["id"]} | self._parent(start),
                run_name=start["name"][:LONGEST],
            )
        )
        return str(run.info.run_id)

    def describe(self, run_id: str, start: Mapping[str, Any], extra: Mapping[str, str]) -> None:
        """Log parameters, tags, data and files; of a continued run, what is new or has changed."""
        run = self.client.get_run(run_id)
        wanted = _named(start["parameters"], LONGEST_PARAMETER)
        tags = start["tags"] | _changes(run, wanted) | dict(extra)
        if NOTE in run.data.tags:  # somebody may have written there
            tags.pop(NOTE, None)
        fresh = [Param(k, v) for k, v in wanted.items() if k not in run.data.params]
        self._send(run_id, fresh, ENTRIES_PER_BATCH, "params")
        named = _named(tags, LONGEST_TAG)
        self._send(run_id, [RunTag(k, v) for k, v in named.items()], ENTRIES_PER_BATCH, "tags")
        for key in {"outcome", "error"} & set(run.data.tags):
            self.client.delete_tag(run_id, key)
        data = [DatasetInput(_dataset(start["dataset"]))]
        self.offers(self.client.log_inputs, run_id, data)
        for path in start["records"]:
            if Path(path).is_file():
                self.client.log_artifact(run_id, path)
        self.client.update_run(run_id, status="RUNNING")
        if sweeps.PARENT in run.data.tags:
            self.offers(sweeps.begin, self.client, run.data.tags[sweeps.PARENT])

    def take(self, run_id: str, points: Sequence[Point]) -> None:
        """Log metrics."""
        self._send(run_id, [_metric(*p) for p in points], METRICS_PER_BATCH, "metrics")

    def _send(self, run_id: str, entries: Sequence[Any], most: int, kind: str) -> None:
        """Log entries of a kind. A batch that MLflow refuses for what it is, it refuses whole:
        halve it until the bad one is alone, and leave that out."""
        for first in range(0, len(entries), most):
            batch = entries[first : first + most]
            if self.offers(self.client.log_batch, run_id, synchronous=True, **{kind: batch}):
                continue
            if not self.has(run_id):
                raise LookupError(f"the run {run_id} was deleted there: restore it")
            if len(batch) == 1:
                log.warning("left out %s: see the line before", str(batch[0])[:500])
                continue
            self._send(run_id, batch, len(batch) // 2, kind)

    def offers(self, call: Callable[..., Any], *given: Any, **named: Any) -> bool:
        """Make a call; False if the store refuses it for what it is, and always would."""
        try:
            call(*given, **named)
        except MlflowException as error:
            status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
            if status not in (400, 413):
                raise
            log.warning("refused: %s", _first_line(error))
            return False
        return True

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set some tags."""
        for key, value in tags.items():
            self.offers(self.client.set_tag, run_id, safe(key), str(value)[:LONGEST_TAG])

    def end(self, run_id: str, last: Mapping[str, Any]) -> None:
        """Set the end state by the last ``start`` or ``end`` row of the journal."""
        outcome = last.get("outcome") or "killed"
        error = last.get("error")
        if outcome == "killed":
            error = "the training process ended without a word (kill -9, out of memory, power)"
        self.tag(run_id, {"outcome": outcome} | ({"error": error} if error else {}))
        self.client.set_terminated(run_id, STATUS.get(outcome, "FAILED"), last.get("time"))
        parent = self.client.get_run(run_id).data.tags.get(sweeps.PARENT)
        if parent is not None:
            self.offers(sweeps.end, self.client, self.experiment_id, parent)

    def add_model(self, run_id: str, row: Mapping[str, Any], points: Sequence[Point]) -> None:
        """Log a checkpoint as a model: where it is, and the metrics of its step."""
        folder = Path(row["folder"])
        facts = {"path": row["folder"], "step": str(row["step"])}
        # It may have been logged, or begun, before an answer got lost.
        model = self.model_of(run_id, folder.name) or self.client.create_logged_model(
            self.experiment_id, model_name(folder.name), run_id, facts, facts, "checkpoint"
        )
        if model.status == LoggedModelStatus.READY:
            return
        for key, value, milliseconds, step in points:
            self.offers(
                self.client.log_metric,
                run_id,
                safe(key),
                value,
                milliseconds,
                step,
                synchronous=True,
                model_id=model.model_id,
            )
        self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, row["step"])])
        self.client.finalize_logged_model(model.model_id, "READY")  # last: now it is whole

    def model_of(self, run_id: str, checkpoint: str) -> LoggedModel | None:
        """Return the logged model of a checkpoint of a run, if there is one."""
        query = f"name = '{model_name(checkpoint)}' AND source_run_id = '{run_id}'"
        found = self.client.search_logged_models([self.experiment_id], query, max_results=1)
        return found[0] if found else None

    def add_file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Log a file or a folder, if it is still there."""
        try:
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), folder)
            elif path.is_file():
                self.client.log_artifact(run_id, str(path), folder)
        except (OSError, MlflowException):
            if path.exists():
                raise
            log.warning("%s was deleted while it was copied", path)

    def _parent(self, start: Mapping[str, Any]) -> dict[str, str]:
        name = start.get("parent")
        if name is None:
            return {}
        with locked(self.uri):
            return {sweeps.PARENT: sweeps.parent_of(self.client, self.experiment_id, name)}

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name, artifacts(self.uri, name))
            except MlflowException as error:  # somebody else made it just now
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise error from None
        if found.lifecycle_stage != "active":
            raise ValueError(
                f"the experiment {name!r} was deleted there: restore it, or set "
                "mlflow.experiment to another name"
            )
        return str(found.experiment_id)


def _metric(key: str, value: float, milliseconds: int, step: int) -> Metric:
    # MLflow stores an infinity as the largest float, which ruins the axis of every plot.
    return Metric(safe(key), value if math.isfinite(value) else math.nan, milliseconds, step)


def _dataset(facts: Mapping[str, Any]) -> Dataset:
    profile = json.dumps(facts["profile"]) if facts["profile"] else None
    source = json.dumps(facts["source"])
    if len(source) > LONGEST_SOURCE:
        short = {key: str(v)[:LONGEST_SOURCE_VALUE] for key, v in facts["source"].items()}
        source = json.dumps(short)[:LONGEST_SOURCE]
    return Dataset(facts["name"], facts["digest"], "local", source, profile=profile)


def _named(facts: Mapping[str, str], longest: int) -> dict[str, str]:
    names = Names()
    return {names.of(key): value[:longest] for key, value in facts.items()}


def _changes(run: MlflowRun, wanted: Mapping[str, str]) -> dict[str, str]:
    """Tell in a tag what MLflow refuses to change in the parameters."""
    kept = run.data.params
    lines = [f"{k}: {kept[k]} -> {v}" for k, v in wanted.items() if kept.get(k, v) != v]
    return {"settings.changed": "\n".join(lines)} if lines else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
