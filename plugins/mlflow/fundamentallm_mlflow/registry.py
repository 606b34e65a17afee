"""The best checkpoint of a run as a version of a registered model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from mlflow import MlflowException

from fundamentallm_mlflow.database import locked

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

    from fundamentallm_mlflow.store import Store

ALIAS = "best"


@attrs.frozen
class Wish:
    """What is to be registered: the checkpoint with the best of one metric."""

    name: str
    monitor: str
    mode: str

    def better(self, one: float, other: float) -> bool:
        """Tell whether one value is better than another."""
        return one > other if self.mode == "max" else one < other


class Candidates:
    """The checkpoints of a run, and what was measured at their steps."""

    def __init__(self) -> None:
        self.wish: Wish | None = None
        self._values: dict[int, float] = {}
        self._folders: dict[str, int] = {}

    def see(self, row: Mapping[str, Any]) -> None:
        """Take notice of a row of the journal."""
        if row["kind"] == "start":
            wish = Wish(**row["registry"]) if row.get("registry") else None
            if wish != self.wish:
                self.wish, self._values = wish, {}
        elif self.wish is None:
            return
        elif row["kind"] == "checkpoint":
            self._folders[row["folder"]] = row["step"]
        elif row["kind"] == "metrics" and self.wish.monitor in row["metrics"]:
            self._values[row["step"]] = row["metrics"][self.wish.monitor]

    def best(self) -> tuple[Path, float] | None:
        """Return the best checkpoint that is still there, and its value."""
        wish, found = self.wish, None
        if wish is None:
            return None
        for folder, step in self._folders.items():
            value, path = self._values.get(step, math.nan), Path(folder)
            is_known = math.isfinite(value) and path.is_dir()
            if is_known and (found is None or wish.better(value, found[1])):
                found = (path, value)
        return found


def register(store: Store, run_id: str, candidates: Candidates) -> None:
    """Make the best checkpoint of a run a version of the registered model. The alias ``best`` goes
    to it if it is better than the version that has it. What is there already is not made twice."""
    wish, best = candidates.wish, candidates.best()
    if wish is None or best is None:
        return
    model = store.model_of(run_id, best[0].name)
    if model is None:  # the store refused it, which has been told
        return
    with locked(store.uri):
        version = _version(store, wish, model, best)
        holder = _holder(store, wish)
        if holder is None or wish.better(best[1], _value(holder, wish)):
            store.client.set_registered_model_alias(wish.name, ALIAS, str(version.version))


def _version(
    store: Store, wish: Wish, model: LoggedModel, best: tuple[Path, float]
) -> ModelVersion:
    client = store.client
    try:
        client.get_registered_model(wish.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        store.offers(client.create_registered_model, wish.name)  # another run may just have
    for version in client.search_model_versions(f"name = '{wish.name}'"):
        if version.tags.get("model_id") == model.model_id:
            return version
    tags = {"model_id": model.model_id, "path": str(best[0]), wish.monitor: repr(best[1])}
    return client.create_model_version(
        wish.name, model.artifact_location, model.source_run_id, tags, model_id=model.model_id
    )


def _holder(store: Store, wish: Wish) -> ModelVersion | None:
    try:
        return store.client.get_model_version_by_alias(wish.name, ALIAS)
    except MlflowException as error:
        if error.get_http_status_code() not in (400, 404):  # type: ignore[no-untyped-call]
            raise
        return None


def _value(version: ModelVersion, wish: Wish) -> float:
    """Return what a version was registered with; one that tells nothing is beaten by any."""
    worst = -math.inf if wish.mode == "max" else math.inf
    try:
        return float(version.tags.get(wish.monitor, worst))
    except ValueError:
        return worst
