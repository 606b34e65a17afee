"""Parent runs, which group the MLflow runs of a sweep."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fundamentallm_mlflow.tracking_uri import is_server

if TYPE_CHECKING:
    from mlflow import MlflowClient

TAG, PARENT = "fundamentallm.parent", "mlflow.parentRunId"
SETTLING_SECONDS = 1.0  # for the runs that other processes create at the same moment to appear


def parent_of(client: MlflowClient, experiment_id: str, name: str) -> str:
    """Return the id of the parent run of that name; create it if there is none.

    The caller has locked a database. A server cannot be locked: a process that created a run there
    searches again a second later, and of several runs created at once the first one stays.
    """
    if not (found := _found(client, experiment_id, name)):
        made = client.create_run(experiment_id, tags={TAG: name}, run_name=name).info.run_id
        if is_server(client.tracking_uri):
            time.sleep(SETTLING_SECONDS)
        found = _found(client, experiment_id, name)
        if found[0] != made:
            client.delete_run(made)
    return found[0]


def set_running(client: MlflowClient, parent: str) -> None:
    """Set the parent to RUNNING."""
    client.update_run(parent, status="RUNNING")


def end_if_last(client: MlflowClient, experiment_id: str, parent: str) -> None:
    """Set the parent to FINISHED, unless one of its runs is still RUNNING."""
    query = f"tags.`{PARENT}` = '{parent}' AND attributes.status = 'RUNNING'"
    if not client.search_runs([experiment_id], query, max_results=1):
        client.set_terminated(parent, "FINISHED")


def _found(client: MlflowClient, experiment_id: str, name: str) -> list[str]:
    runs = client.search_runs([experiment_id], f"tags.`{TAG}` = '{name}'", max_results=1000)
    oldest = sorted((run.info.start_time, run.info.run_id) for run in runs)
    return [run_id for _, run_id in oldest]
