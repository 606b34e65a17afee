"""Runs that belong together: a parent run, which the first of them makes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fundamentallm_mlflow.places import is_server

if TYPE_CHECKING:
    from mlflow import MlflowClient

TAG, PARENT = "fundamentallm.parent", "mlflow.parentRunId"
SETTLING_SECONDS = 1.0


def parent_of(client: MlflowClient, experiment_id: str, name: str) -> str:
    """Return the id of the parent run of that name, which is made if there is none.

    The caller holds the lock of a database. A server has none: whoever made a run there looks once
    more after a while, and of several that were made at once the first one stays.
    """
    if not (found := _found(client, experiment_id, name)):
        made = client.create_run(experiment_id, tags={TAG: name}, run_name=name).info.run_id
        if is_server(client.tracking_uri):
            time.sleep(SETTLING_SECONDS)
        found = _found(client, experiment_id, name)
        if found[0] != made:
            client.delete_run(made)
    return found[0]


def begin(client: MlflowClient, parent: str) -> None:
    """Tell that a run of the parent goes on."""
    client.update_run(parent, status="RUNNING")


def end(client: MlflowClient, experiment_id: str, parent: str) -> None:
    """End the parent, unless another of its runs is going on."""
    query = f"tags.`{PARENT}` = '{parent}' AND attributes.status = 'RUNNING'"
    if not client.search_runs([experiment_id], query, max_results=1):
        client.set_terminated(parent, "FINISHED")


def _found(client: MlflowClient, experiment_id: str, name: str) -> list[str]:
    runs = client.search_runs([experiment_id], f"tags.`{TAG}` = '{name}'", max_results=1000)
    oldest = sorted((run.info.start_time, run.info.run_id) for run in runs)
    return [run_id for _, run_id in oldest]
