"""Where the store is, and where to look at what is in it."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm_mlflow.journal import turns_of

if TYPE_CHECKING:
    from collections.abc import Mapping

PORT = 5000
VARIABLE = "MLFLOW_TRACKING_URI"
QUERY = "workflowType=machine_learning&compareRunsMode=CHART"

log = logging.getLogger("fundamentallm")


def chosen(uri: str | None) -> str:
    """Return the URI of the store such that it means the same in every folder."""
    uri = uri or os.environ.get(VARIABLE) or "sqlite:///mlflow.db"
    scheme, separator, path = uri.partition(":///")
    if scheme == "sqlite" and separator and path and not path.startswith((":memory:", "file:")):
        return f"sqlite:///{Path.cwd() / path}"
    return uri


def settled(asked: str | None, folder: Path) -> str:
    """Return the URI of the store of the run with its journal in ``folder``: where nobody names
    another one, that of before, in whatever folder the command is given."""
    now, before = chosen(asked), _last_start(folder / "journal.jsonl")
    was = before.get("store")
    if was is None or masked(now) == was:
        return now
    is_relative = asked is not None and chosen(asked) != asked
    if (is_relative and asked == before["asked"]) or not (asked or os.environ.get(VARIABLE)):
        return str(was).replace(":***@", "@")  # a password is not kept
    log.warning("mlflow: the store of this run is now %s; it was %s", masked(now), was)
    return now


def noted(asked: str | None, uri: str) -> dict[str, str | None]:
    """Return what the journal keeps for ``settled``."""
    return {"asked": masked(asked) if asked else None, "store": masked(uri)}


def _last_start(journal: Path) -> Mapping[str, Any]:
    if not journal.is_file():
        return {}
    starts = [row for _, row in turns_of(journal) if row["kind"] == "start"]
    return starts[-1] if starts else {}


def masked(uri: str) -> str:
    """Return a URI without its password."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", uri)


def is_server(uri: str) -> bool:
    """Tell whether the store is a server, which shows itself."""
    return uri.startswith(("http://", "https://"))


def charts(uri: str, experiment_id: str, port: int = PORT) -> str:
    """Return the URL of the comparison of an experiment's runs."""
    server = re.sub(r"//[^/@]*@", "//", uri) if is_server(uri) else f"http://127.0.0.1:{port}"
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{QUERY}"
