"""Register the best checkpoint of a run as a version of a registered model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from mlflow import MlflowException

from fundamentallm_mlflow.worker.client import locked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

    from fundamentallm_mlflow.worker.client import Client

ALIAS = "best"


@attrs.frozen
class Registration:
    """What to register: the checkpoint with the best value of one metric."""

    name: str
    monitor: str
    mode: str

    def better(self, one: float, other: float) -> bool:
        """Return whether ``one`` is better than ``other``."""
        return one > other if self.mode == "max" else one < other


class Candidates:
    """The checkpoints of a run and the values of the monitored metric at their steps."""

    def __init__(self) -> None:
        self.wanted: Registration | None = None
        self._values: dict[int, float] = {}
        self._folders: dict[str, int] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row of the journal."""
        if row["kind"] == "start":
            wanted = Registration(**row["registry"]) if row.get("registry") else None
            if wanted != self.wanted:
                # Values of another metric cannot be compared with those that follow.
                self.wanted, self._values = wanted, {}
        elif self.wanted is None:
            return
        elif row["kind"] == "checkpoint":
            self._folders[row["folder"]] = row["step"]
        elif row["kind"] == "metrics" and self.wanted.monitor in row["metrics"]:
            self._values[row["step"]] = row["metrics"][self.wanted.monitor]

    def best(self) -> tuple[Path, float] | None:
        """Return the best checkpoint that still exists, and its value."""
        wanted, found = self.wanted, None
        if wanted is None:
            return None
        for folder, step in self._folders.items():
            value, path = self._values.get(step, math.nan), Path(folder)
            is_known = math.isfinite(value) and path.is_dir()
            if is_known and (found is None or wanted.better(value, found[1])):
                found = (path, value)
        return found


def register(client: Client, run_id: str, candidates: Candidates) -> None:
    """Register the best checkpoint of a run; calling it twice creates one version.

    The version gets the alias ``best`` if it is better than the version that has the alias.
    """
    wanted, best = candidates.wanted, candidates.best()
    if wanted is None or best is None:
        return
    model = client.model_of(run_id, best[0].name)
    if model is None:  # the store refused it, which is in the log
        return
    with locked(client.uri):
        version = _version(client, wanted, model, best)
        current = _best_version(client, wanted)
        if current is None or wanted.better(best[1], _value(current, wanted)):
            client.api.set_registered_model_alias(wanted.name, ALIAS, str(version.version))


def _version(
    client: Client, wanted: Registration, model: LoggedModel, best: tuple[Path, float]
) -> ModelVersion:
    api = client.api
    try:
        api.get_registered_model(wanted.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.accepted(api.create_registered_model, wanted.name)  # another run may have created it
    # An earlier call may have created it and lost the answer.
    for version in api.search_model_versions(f"name = '{wanted.name}'"):
        if version.tags.get("model_id") == model.model_id:
            return version
    tags = {"model_id": model.model_id, "path": str(best[0]), wanted.monitor: repr(best[1])}
    return api.create_model_version(
        wanted.name, model.artifact_location, model.source_run_id, tags, model_id=model.model_id
    )


def _best_version(client: Client, wanted: Registration) -> ModelVersion | None:
    try:
        return client.api.get_model_version_by_alias(wanted.name, ALIAS)
    except MlflowException as error:
        if error.get_http_status_code() not in (400, 404):  # type: ignore[no-untyped-call]
            raise
        return None


def _value(version: ModelVersion, wanted: Registration) -> float:
    """Return the value that a version was registered with; the worst one if it has none."""
    worst = -math.inf if wanted.mode == "max" else math.inf
    try:
        return float(version.tags.get(wanted.monitor, worst))
    except ValueError:
        return worst
