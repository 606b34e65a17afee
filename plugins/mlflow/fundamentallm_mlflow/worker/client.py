"""The calls to the MLflow store. Only this module and ``registry`` import mlflow.

A call whose answer was lost is repeated, so each call here can be made twice with one effect.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import math
import posixpath
import re
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

from fundamentallm_mlflow.tracking_uri import artifacts, database
from fundamentallm_mlflow.worker import parent_runs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mlflow.entities import LoggedModel
    from mlflow.entities import Run as MlflowRun

# Key, value, milliseconds since 1970, step.
Point: TypeAlias = tuple[str, float, int, int]

# MLflow's limits: entries of a call, and characters. Only LONGEST_SOURCE_VALUE is our own.
METRICS_PER_BATCH = 1000
ENTRIES_PER_BATCH = 100
LONGEST_NAME = 250
LONGEST_PARAMETER, LONGEST_TAG = 6000, 8000
LONGEST_SOURCE, LONGEST_SOURCE_VALUE = 65_535, 1000
STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "interrupted": "KILLED"}
START_TAG = "fundamentallm.start"
NOTE = "mlflow.note.content"

log = logging.getLogger("worker")


@functools.lru_cache(maxsize=4096)
def safe(key: str) -> str:
    """Return a name that MLflow accepts; an acceptable key stays unchanged.

    MLflow allows few characters, at most 250 of them, in the form of a normal relative path.
    """
    allowed = re.sub(r"[^\w./ :-]", "_", key, flags=re.ASCII)
    plain = posixpath.normpath(allowed).lstrip("/.") or "_"
    return plain if len(plain) <= LONGEST_NAME else _with_digest(plain, key)


class Names:
    """Distinct safe names: if two keys would get one name, the later gets a digest of the key."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}

    def of(self, key: str) -> str:
        """Return the name of a key; it depends only on the key and the keys before it."""
        name = safe(key)
        return name if self._keys.setdefault(name, key) == key else _with_digest(name, key)


def model_name(checkpoint: str) -> str:
    """Return the name of the logged model of a checkpoint."""
    return re.sub(r"[^\w-]", "_", checkpoint, flags=re.ASCII)


def _with_digest(name: str, key: str) -> str:
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9].rstrip('/ .')}_{digest}"


@contextlib.contextmanager
def locked(uri: str) -> Iterator[None]:
    """Lock a sqlite database while it is opened or changed in several calls.

    Two processes that create the tables of one new database at the same time can damage it.
    """
    path = database(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Client:
    """An open store and one experiment in it, which is created if it does not exist."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri
        with locked(uri):
            self.api = MlflowClient(uri, registry_uri=uri)
            self.experiment_id = self._experiment(experiment)

    def has(self, run_id: str) -> bool:
        """Return whether a run exists and is not deleted."""
        try:
            return bool(self.api.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def run_for(self, start: Mapping[str, Any]) -> str:
        """Return the run of a ``start`` row; create it unless an earlier call already did."""
        query = f"tags.`{START_TAG}` = '{start['id']}'"
        found = self.api.search_runs([self.experiment_id], query, max_results=1)
        run = (
            found[0]
            if found
            else self.api.create_run(
                self.experiment_id,
                start["time"],
                {START_TAG: start["id"]} | self._parent(start),
                run_name=start["name"][:LONGEST_NAME],
            )
        )
        return str(run.info.run_id)

    def describe(self, run_id: str, start: Mapping[str, Any], extra: Mapping[str, str]) -> None:
        """Log parameters, tags, data and files; for a resumed run only new and changed ones."""
        run = self.api.get_run(run_id)
        wanted = _named(start["parameters"], LONGEST_PARAMETER)
        tags = start["tags"] | _changes(run, wanted) | dict(extra)
        if NOTE in run.data.tags:  # a user may have edited it
            tags.pop(NOTE, None)
        fresh = [Param(k, v) for k, v in wanted.items() if k not in run.data.params]
        self._send(run_id, fresh, ENTRIES_PER_BATCH, "params")
        named = _named(tags, LONGEST_TAG)
        self._send(run_id, [RunTag(k, v) for k, v in named.items()], ENTRIES_PER_BATCH, "tags")
        # They are from the end of an earlier process, and the run goes on now.
        for key in {"outcome", "error"} & set(run.data.tags):
            self.api.delete_tag(run_id, key)
        data = [DatasetInput(_dataset(start["dataset"]))]
        self.accepted(self.api.log_inputs, run_id, data)
        for path in start["records"]:
            if Path(path).is_file():
                self.api.log_artifact(run_id, path)
        self.api.update_run(run_id, status="RUNNING")
        if parent_runs.PARENT in run.data.tags:
            self.accepted(parent_runs.set_running, self.api, run.data.tags[parent_runs.PARENT])

    def take(self, run_id: str, points: Sequence[Point]) -> None:
        """Log metrics."""
        self._send(run_id, [_metric(*p) for p in points], METRICS_PER_BATCH, "metrics")

    def _send(self, run_id: str, entries: Sequence[Any], most: int, kind: str) -> None:
        """Log entries of a kind.

        MLflow refuses a batch as a whole because of one invalid entry. Halve the batch until the
        invalid entry is alone, and leave it out.
        """
        for first in range(0, len(entries), most):
            batch = entries[first : first + most]
            if self.accepted(self.api.log_batch, run_id, synchronous=True, **{kind: batch}):
                continue
            if not self.has(run_id):
                raise LookupError(f"the run {run_id} is deleted in the store: restore it")
            if len(batch) == 1:
                log.warning("left out %s: see the line before", str(batch[0])[:500])
                continue
            self._send(run_id, batch, len(batch) // 2, kind)

    def accepted(self, call: Callable[..., Any], *given: Any, **named: Any) -> bool:
        """Make a call; return False if the store refuses it as invalid: a retry cannot help."""
        try:
            call(*given, **named)
        except MlflowException as error:
            status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
            # Any other error may pass: the caller tries again later. 413 is a request that is too
            # large, and a half of it may be accepted.
            if status not in (400, 413):
                raise
            log.warning("refused: %s", _first_line(error))
            return False
        return True

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set some tags."""
        for key, value in tags.items():
            self.accepted(self.api.set_tag, run_id, safe(key), str(value)[:LONGEST_TAG])

    def end(self, run_id: str, last: Mapping[str, Any]) -> None:
        """Set the end state from the last ``start`` or ``end`` row of the journal."""
        # If the last row is a ``start``, no process was able to write an ``end``.
        outcome = last.get("outcome") or "killed"
        error = last.get("error")
        if outcome == "killed":
            error = "the training process was killed (kill -9, out of memory, power failure)"
        self.tag(run_id, {"outcome": outcome} | ({"error": error} if error else {}))
        self.api.set_terminated(run_id, STATUS.get(outcome, "FAILED"), last.get("time"))
        parent = self.api.get_run(run_id).data.tags.get(parent_runs.PARENT)
        if parent is not None:
            self.accepted(parent_runs.end_if_last, self.api, self.experiment_id, parent)

    def add_model(self, run_id: str, row: Mapping[str, Any], points: Sequence[Point]) -> None:
        """Log a checkpoint as a model, with its path and the metrics of its step."""
        folder = Path(row["folder"])
        facts = {"path": row["folder"], "step": str(row["step"])}
        # An earlier call may have created it, completely or not.
        model = self.model_of(run_id, folder.name) or self.api.create_logged_model(
            self.experiment_id, model_name(folder.name), run_id, facts, facts, "checkpoint"
        )
        if model.status == LoggedModelStatus.READY:
            return
        for key, value, milliseconds, step in points:
            self.accepted(
                self.api.log_metric,
                run_id,
                safe(key),
                value,
                milliseconds,
                step,
                synchronous=True,
                model_id=model.model_id,
            )
        self.api.log_outputs(run_id, [LoggedModelOutput(model.model_id, row["step"])])
        self.api.finalize_logged_model(model.model_id, "READY")  # last: now it is complete

    def model_of(self, run_id: str, checkpoint: str) -> LoggedModel | None:
        """Return the logged model of a checkpoint of a run; None if there is none."""
        query = f"name = '{model_name(checkpoint)}' AND source_run_id = '{run_id}'"
        found = self.api.search_logged_models([self.experiment_id], query, max_results=1)
        return found[0] if found else None

    def add_file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Upload a file or a folder; skip one that was deleted."""
        try:
            if path.is_dir():
                self.api.log_artifacts(run_id, str(path), folder)
            elif path.is_file():
                self.api.log_artifact(run_id, str(path), folder)
        except (OSError, MlflowException):
            if path.exists():
                raise
            log.warning("%s was deleted during its upload", path)

    def _parent(self, start: Mapping[str, Any]) -> dict[str, str]:
        name = start.get("parent")
        if name is None:
            return {}
        with locked(self.uri):
            return {parent_runs.PARENT: parent_runs.parent_of(self.api, self.experiment_id, name)}

    def _experiment(self, name: str) -> str:
        found = self.api.get_experiment_by_name(name)
        if found is None:
            try:
                return self.api.create_experiment(name, artifacts(self.uri, name))
            except MlflowException as error:  # another process may have created it just now
                found = self.api.get_experiment_by_name(name)
                if found is None:
                    raise error from None
        if found.lifecycle_stage != "active":
            raise ValueError(
                f"the experiment {name!r} is deleted in the store: restore it, or set "
                "mlflow.experiment to another name"
            )
        return str(found.experiment_id)


def _metric(key: str, value: float, milliseconds: int, step: int) -> Metric:
    # MLflow stores an infinity as the largest float, which flattens every plot.
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
    """Return a tag with the changed parameters: MLflow keeps the first value of a parameter."""
    kept = run.data.params
    lines = [f"{k}: {kept[k]} -> {v}" for k, v in wanted.items() if kept.get(k, v) != v]
    return {"settings.changed": "\n".join(lines)} if lines else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
