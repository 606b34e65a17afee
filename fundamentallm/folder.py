"""Read a run folder: its settings, state, metrics and checkpoints. Imports no torch.

A run folder holds ``settings.toml`` and ``environment.json`` (written when everything is built),
``outcome.json`` (written at the end), ``metrics.jsonl`` and ``checkpoints/`` (written by plugins),
and ``.lock`` (locked while a process trains the run). Module ``record`` writes the core's part.
Nothing here writes, and damaged files raise no error unless the docstring says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import attrs
import tomli

from fundamentallm.errors import SettingsError, StorageError

SETTINGS = "settings.toml"
ENVIRONMENT = "environment.json"
OUTCOME = "outcome.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
CODE = "code"
ELSEWHERE = "checkpoint-folders"
"""A file that lists folders outside of the run folder that hold checkpoints of the run."""
LOCK = ".lock"
LATEST = 1e12
"""Unix time in seconds: no row can have a later one."""

State: TypeAlias = Literal["running", "finished", "stopped", "interrupted", "failed", "killed"]
"""``killed``: the process ended without writing how, as after kill -9 or a power cut."""
_ENDS = set(get_args(State)) - {"running", "killed"}
# The name of a published checkpoint; while it is written or deleted, it has another one.
_STEP = re.compile(r"step-(\d{8,18})")


@attrs.frozen
class Ending:
    """How a run ended last: the content of ``outcome.json``."""

    outcome: Literal["finished", "stopped", "interrupted", "failed"]
    step: int = 0
    """Completed steps."""
    begun: bool = True
    """Whether everything was built; false if the start failed or was interrupted before that."""
    reason: str | None = None
    """Why the run was stopped, or the signal that interrupted it."""
    error: str | None = None
    """Type and first line of the error of a failed run."""
    exit_code: int | None = None
    time: float = 0.0
    """Unix time in seconds."""


@attrs.frozen
class Owner:
    """The process that trains a run now."""

    pid: int
    started: float
    """When it locked the folder, as Unix time in seconds."""


@attrs.frozen
class Row:
    """One row of metrics."""

    step: int
    tokens: int
    time: float
    """Unix time in seconds."""
    metrics: dict[str, float]


@attrs.frozen
class Checkpoint:
    """What the manifest of a checkpoint says; whether its files agree is not checked here."""

    folder: Path
    step: int
    run: str = ""
    """The id of the run that saved it."""
    created: float = 0.0
    """Unix time in seconds."""
    metrics: dict[str, float] = attrs.field(factory=dict)
    """What was measured at its step."""
    tags: tuple[str, ...] = ()
    contents: str = "all"
    """``"all"`` that a run needs to continue, or the ``"model"`` alone."""
    finite: bool = True
    data: str = ""
    """The fingerprint of the training data."""
    size: int = 0
    """Bytes of all its files."""


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run folder: whether it has recorded settings."""
    return (folder / SETTINGS).is_file()


def settings(folder: Path) -> dict[str, Any]:
    """Return the recorded settings as TOML states them; raise ``SettingsError`` if there are none,
    ``StorageError`` if they cannot be read."""
    path = folder / SETTINGS
    if not path.is_file():
        raise SettingsError(f"{folder}: is not a run folder: it has no {SETTINGS}")
    try:
        return tomli.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        raise StorageError(f"{path}: cannot be read: {error}") from error


def environment(folder: Path) -> dict[str, Any]:
    """Return what the run was started in (versions, machine, command); {} if that is unreadable."""
    return _table(folder / ENVIRONMENT)


def ending(folder: Path) -> Ending | None:
    """Return how the run ended last; None while it has not, and if the file is unreadable."""
    facts = _table(folder / OUTCOME)
    kinds: dict[str, Any] = {
        "step": int,
        "begun": bool,
        "reason": str,
        "error": str,
        "exit_code": int,
        "time": int | float,
    }
    sound = {n: facts[n] for n, kind in kinds.items() if isinstance(facts.get(n), kind)}
    outcome = facts.get("outcome")
    return Ending(facts["outcome"], **sound) if str(outcome) in _ENDS else None


def state(folder: Path) -> State:
    """Return whether a run is going on, or how it ended."""
    if is_running(folder):  # first: a run that ends meanwhile has written its outcome
        return "running"
    ended = ending(folder)
    return "killed" if ended is None else ended.outcome


def failed_to_start(folder: Path) -> bool:
    """Return whether the last start in a folder ended before everything was built."""
    ended = ending(folder)
    return ended is not None and not ended.begun


def is_running(folder: Path) -> bool:
    """Return whether a live process has locked the run; asking leaves no trace."""
    try:
        with (folder / LOCK).open("rb") as lock:
            # Shared: it fails only while a process trains the run, not while others ask the same.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def owner(folder: Path) -> Owner | None:
    """Return the process that trains the run; None if none does, or if it cannot be known."""
    facts = _table(folder / LOCK)
    try:
        found = Owner(int(facts["pid"]), float(facts["started"]))
    except (LookupError, TypeError, ValueError):
        return None
    # The file stays when its process ends: its content is valid only while the lock is held.
    return found if is_running(folder) else None


def rows(folder: Path) -> Iterator[Row]:
    """Yield the rows of ``metrics.jsonl`` in order; skip lines that are not whole rows."""
    path = folder / METRICS
    if not path.exists():
        return
    with path.open("rb") as lines:
        yield from filter(None, map(parse_row, lines))


def parse_row(line: bytes | str) -> Row | None:
    """Return the row in one line of ``metrics.jsonl``; None if the line is not a whole row."""
    try:
        facts = json.loads(line)
        step, tokens, when = facts["step"], facts["tokens"], float(facts["time"])
        # Not isinstance: JSON's true would be step 1.
        if type(step) is not int or type(tokens) is not int or not abs(when) < LATEST:
            return None
        # JSON has no NaN: it is the string "NaN", which float() understands. Other programs write
        # null for it.
        metrics = {n: float("nan" if v is None else v) for n, v in facts["metrics"].items()}
        return Row(step, tokens, when, metrics)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return None


def checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the published checkpoints of a run, of all savers, the newest step last.

    Incomplete, deleted and superseded ones are left out, and those that another run saved in a
    folder that both use.
    """
    own = folder / CHECKPOINTS
    elsewhere = [Path(os.fsdecode(line)) for line in _lines(folder / ELSEWHERE)]
    homes = [home for top in (own, *elsewhere) for home in (top, *_instances(top))]
    # Read as a plain file, since the core imports no plugin.
    run = b"".join(_lines(folder / "run-id")[:1]).decode("ascii", "replace")
    paths = dict.fromkeys(path for home in homes for path in home.glob("step-*/manifest.json"))
    found = [_checkpoint(path) for path in paths if _STEP.fullmatch(path.parent.name)]
    # Runs may share a folder outside of their run folders: there the id of the run decides.
    mine = [one for one in found if one.folder.is_relative_to(own) or one.run in ("", run)]
    return sorted(mine, key=lambda one: (one.step, one.created))


def _instances(home: Path) -> list[Path]:
    """Return the folders in ``home`` that further savers may use."""
    below = sorted(home.glob("*/"))
    return [path for path in below if not path.name.startswith((".", "superseded-", "step-"))]


def _checkpoint(manifest: Path) -> Checkpoint:
    facts = _table(manifest)
    kinds: dict[str, Any] = {
        "run": str,
        "created": int | float,
        "contents": str,
        "finite": bool,
        "data": str,
    }
    # Of a damaged manifest, a field of the wrong type gets its default.
    sound = {n: facts[n] for n, kind in kinds.items() if isinstance(facts.get(n), kind)}
    files = _inner(facts, "files").values()
    sizes = [one["size"] for one in files if isinstance(one, dict) and "size" in one]
    tags = facts["tags"] if isinstance(facts.get("tags"), list) else []
    return Checkpoint(
        manifest.parent,
        int(manifest.parent.name.removeprefix("step-")),
        metrics={name: _number(value) for name, value in _inner(facts, "metrics").items()},
        tags=tuple(map(str, tags)),
        size=sum(size for size in sizes if isinstance(size, int)),
        **sound,
    )


def _number(value: Any) -> float:
    """Return a metric of a manifest; ``{"$float": "nan"}`` is how it writes what JSON lacks."""
    with contextlib.suppress(LookupError, TypeError, ValueError, OverflowError):
        return float(value["$float"] if isinstance(value, dict) else value)
    return math.nan


def _table(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} if there is none, or if it is damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _inner(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = facts.get(name)
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[bytes]:
    with contextlib.suppress(OSError):
        # A path with a zero byte would raise a ValueError wherever it is used.
        return [line for line in path.read_bytes().splitlines() if line and b"\0" not in line]
    return []
