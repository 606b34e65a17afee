"""A store that is a sqlite database: its file, its lock, and where the files of runs go."""

from __future__ import annotations

import contextlib
import fcntl
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def database(uri: str) -> Path | None:
    """Return the file of a sqlite store; None for a store of another kind."""
    scheme, separator, path = uri.partition(":///")
    return Path(path) if separator and scheme == "sqlite" and path else None


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


def artifacts(uri: str, experiment: str) -> str | None:
    """Return where the files of an experiment go: beside a sqlite database, wherever the command
    was run; a server knows its own place."""
    path = database(uri)
    name = re.sub(r"[^\w.-]+", "_", experiment, flags=re.ASCII)
    return None if path is None else (path.parent / "mlartifacts" / name).as_uri()
