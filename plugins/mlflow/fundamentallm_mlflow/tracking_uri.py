"""The address of the store, and the address of its charts."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm_mlflow.journal import starts_and_rewinds

if TYPE_CHECKING:
    from collections.abc import Mapping

PORT = 5000
VARIABLE = "MLFLOW_TRACKING_URI"
QUERY = "workflowType=machine_learning&compareRunsMode=CHART"

log = logging.getLogger("fundamentallm")


def absolute(uri: str | None) -> str:
    """Return the URI of the store with an absolute path, so that every folder can use it."""
    uri = uri or os.environ.get(VARIABLE) or "sqlite:///mlflow.db"
    scheme, separator, path = uri.partition(":///")
    if scheme == "sqlite" and separator and path and not path.startswith((":memory:", "file:")):
        return f"sqlite:///{Path.cwd() / path}"
    return uri


def store_of(setting: str | None, folder: Path) -> str:
    """Return the URI of the store of the run with its journal in ``folder``.

    Unless the setting or the environment names another store, this is the store of the last start,
    whatever the working directory is.
    """
    now, before = absolute(setting), _last_start(folder / "journal.jsonl")
    was = before.get("store")
    if was is None or masked(now) == was:
        return now
    # A relative path means the file that it meant at the first start.
    is_relative = setting is not None and absolute(setting) != setting
    is_same = is_relative and setting == before["tracking_uri"]
    if is_same or not (setting or os.environ.get(VARIABLE)):
        return str(was).replace(":***@", "@")  # the journal has no password
    log.warning("mlflow: the store of this run is now %s; it was %s", masked(now), was)
    return now


def recorded_uri(setting: str | None, uri: str) -> dict[str, str | None]:
    """Return the fields of the ``start`` row that ``store_of`` reads, without passwords."""
    return {"tracking_uri": masked(setting) if setting else None, "store": masked(uri)}


def _last_start(journal: Path) -> Mapping[str, Any]:
    if not journal.is_file():
        return {}
    starts = [row for _, row in starts_and_rewinds(journal) if row["kind"] == "start"]
    return starts[-1] if starts else {}


def masked(uri: str) -> str:
    """Return a URI without its password."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", uri)


def is_server(uri: str) -> bool:
    """Return whether the store is a server, which has web pages of its own."""
    return uri.startswith(("http://", "https://"))


def charts(uri: str, experiment_id: str, port: int = PORT) -> str:
    """Return the URL of the page that compares the runs of an experiment."""
    server = re.sub(r"//[^/@]*@", "//", uri) if is_server(uri) else f"http://127.0.0.1:{port}"
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{QUERY}"


def database(uri: str) -> Path | None:
    """Return the file of a sqlite store; None for a store of another kind."""
    scheme, separator, path = uri.partition(":///")
    return Path(path) if separator and scheme == "sqlite" and path else None


def artifacts(uri: str, experiment: str) -> str | None:
    """Return where the files of an experiment go: next to a sqlite database, else None.

    MLflow's own default would be the working directory. A server has a place of its own.
    """
    path = database(uri)
    name = re.sub(r"[^\w.-]+", "_", experiment, flags=re.ASCII)
    return None if path is None else (path.parent / "mlartifacts" / name).as_uri()
