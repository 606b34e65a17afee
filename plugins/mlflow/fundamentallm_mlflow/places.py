"""Where the store is, and where to look at what is in it."""

from __future__ import annotations

import os
import re
from pathlib import Path

PORT = 5000
QUERY = "workflowType=machine_learning&compareRunsMode=CHART"


def chosen(uri: str | None) -> str:
    """Return the URI of the store such that it means the same in every folder."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    scheme, separator, path = uri.partition(":///")
    if scheme == "sqlite" and separator and path and not path.startswith((":memory:", "file:")):
        return f"sqlite:///{Path.cwd() / path}"
    return uri


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
