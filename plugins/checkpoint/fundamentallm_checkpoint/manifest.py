"""What a checkpoint says about itself, written last: its files, and how to know them again."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import attrs

from fundamentallm_checkpoint import trees
from fundamentallm_checkpoint.files import Seal, measure

FORMAT = 1
"""Grows when older versions of this plugin could no longer read what a newer one writes."""

NAME = "manifest.json"
REQUIRED = ("model.safetensors", "optimizer.safetensors", "state.json")
_LIMIT = 2**20
_FOLDER = re.compile(r"step-(\d{8,18})")


class Unsound(Exception):
    """A checkpoint is not what its manifest says, or has none; ``str()`` tells how."""


class Newer(Unsound):
    """A checkpoint that only a newer version of this plugin can read."""


@attrs.frozen(kw_only=True)
class Manifest:
    """The facts about one checkpoint."""

    step: int
    run: str
    """The id of the run, made at random at its first start."""
    created: float
    """Unix time in seconds."""
    settings: str
    """SHA-256 of the run's ``settings.toml``; empty if there is none."""
    data: str
    """The fingerprint of the data source."""
    metrics: dict[str, float]
    """What was measured at this very step; empty if nothing was."""
    tags: tuple[str, ...] = ()
    finite: bool = True
    """Whether weights and optimizer state are free of NaN and infinity."""
    files: dict[str, Seal] = attrs.field(factory=dict)
    format: int = FORMAT

    def to_json(self) -> bytes:
        """Return the manifest as strict JSON; raise ``StorageError`` if it is too large to read."""
        facts = attrs.asdict(self) | {"tags": list(self.tags)}
        text = trees.to_json(trees.split(facts, {}), indent=1)
        trees.check_size(NAME, text, _LIMIT)
        return text

    def score(self, monitor: str, mode: str) -> float:
        """Return how good the checkpoint is, smaller being better; infinity if it cannot tell."""
        value = self.metrics.get(monitor, math.nan)
        if math.isnan(value) or not self.finite:
            return math.inf
        return value if mode == "min" else -value


def folder_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step that a folder's name tells, or None for any other folder."""
    found = _FOLDER.fullmatch(name)
    return int(found[1]) if found else None


def read(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and see that its files have the right sizes.

    Raises ``Unsound``, and ``Newer`` if a newer version of this plugin wrote it.
    """
    manifest = _read(folder)
    if manifest.step != step_of(folder.name):
        raise Unsound(f"{NAME} is one of step {manifest.step}")
    for name, seal in manifest.files.items():
        _check_size(folder / name, seal)
    return manifest


def owner(folder: Path) -> str | None:
    """Return the id of the run that a checkpoint is of; None if it cannot tell."""
    try:
        return _read(folder).run
    except Unsound:
        return None


def verify(folder: Path, manifest: Manifest) -> None:
    """Read every file of a checkpoint; raise ``Unsound`` if one byte is not as it was written."""
    for name, seal in manifest.files.items():
        try:
            found = measure(folder / name)
        except OSError as error:
            raise Unsound(f"{name} cannot be read: {error.strerror}") from error
        if found != seal:
            raise Unsound(f"{name} was changed after it was written (its sha256 differs)")


def _read(folder: Path) -> Manifest:
    try:
        facts = trees.read_json(folder / NAME, _LIMIT)
        _check_format(facts)
        return _parse(trees.join(facts, {}))
    except FileNotFoundError:
        raise Unsound(f"{NAME} is missing") from None
    except OSError as error:
        raise Unsound(f"{NAME} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise Unsound(f"{NAME} {error}") from error


def _check_size(path: Path, seal: Seal) -> None:
    try:
        found = path.lstat()
    except OSError as error:
        raise Unsound(f"{path.name} cannot be read: {error.strerror}") from error
    if path.is_symlink() or not path.is_file():
        raise Unsound(f"{path.name} is not a regular file")
    if found.st_size != seal.size:
        raise Unsound(f"{path.name} has {found.st_size:,} bytes instead of {seal.size:,}")


def _check_format(facts: Any) -> None:
    version = facts.get("format") if isinstance(facts, dict) else None
    if not isinstance(version, int) or version < 1:
        raise ValueError("tells no format")
    if version > FORMAT:
        raise Newer(
            f"it has format {version}, and this version of fundamentallm-checkpoint reads format"
            f" {FORMAT}: pip install --upgrade fundamentallm-checkpoint"
        )


def _parse(facts: dict[str, Any]) -> Manifest:
    kinds = {"step": int, "run": str, "created": (int, float), "settings": str, "data": str,
             "metrics": dict, "tags": list, "finite": bool, "files": dict}  # fmt: skip
    untold = [n for n, kind in kinds.items() if not isinstance(facts.get(n), kind)]  # type: ignore[arg-type]
    if untold:
        raise ValueError(f"tells no {', '.join(untold)}")
    kept = {name: facts[name] for name in kinds}
    kept["tags"] = tuple(str(tag) for tag in kept["tags"])
    numbers = ((name, value) for name, value in kept["metrics"].items())
    kept["metrics"] = {name: float(v) for name, v in numbers if isinstance(v, int | float)}
    kept["files"] = {name: _seal(name, seal) for name, seal in kept["files"].items()}
    missing = [name for name in REQUIRED if name not in kept["files"]]
    if missing:
        raise ValueError(f"lists no {', '.join(missing)}")
    return Manifest(**kept)


def _seal(name: str, facts: Any) -> Seal:
    if name != Path(name).name or name.startswith(".") or "\0" in name:
        raise ValueError(f"lists {name!r}, which is not a plain file name")
    size, sha256 = (facts.get("size"), facts.get("sha256")) if isinstance(facts, dict) else (0, 0)
    if not isinstance(size, int) or size < 0 or not isinstance(sha256, str):
        raise ValueError(f"does not tell size and sha256 of {name}")
    return Seal(size, sha256)
