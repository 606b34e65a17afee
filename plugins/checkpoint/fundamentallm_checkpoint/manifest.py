"""What a checkpoint says about itself, written last: its files, and how to know them again."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any, TypeGuard

import attrs

from fundamentallm_checkpoint import files, jsontext
from fundamentallm_checkpoint.files import Seal

FORMAT = 2
"""Grows when older versions of this plugin could no longer read what a newer one writes. Every
version reads all formats up to its own.

1: the first. 2: the manifest has a seal and tells its ``contents``; the state has the settings."""

NAME = "manifest.json"
ALL, MODEL = "all", "model"
_REQUIRED = {
    ALL: ("model.safetensors", "optimizer.safetensors", "state.json"),
    MODEL: ("model.safetensors", "state.json"),
}
_LIMIT = 2**20
_FOLDER = re.compile(r"step-(\d{8,18})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SEAL = b',\n "seal": "'


class Unsound(Exception):
    """A checkpoint is not what its manifest says, or has none; ``str()`` tells how."""


class Newer(Unsound):
    """A checkpoint that only a newer version of this plugin can read."""


class TooLarge(Unsound):
    """A checkpoint for which there is no memory now: nothing may be wrong with it."""


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
    contents: str = ALL
    """``"all"`` that a run needs to go on, or the ``"model"`` alone."""
    finite: bool = True
    """Whether weights and optimizer state are free of NaN and infinity."""
    files: dict[str, Seal] = attrs.field(factory=dict)
    format: int = FORMAT

    @property
    def size(self) -> int:
        """The bytes of all its files."""
        return sum(seal.size for seal in self.files.values())

    def to_json(self) -> bytes:
        """Return the manifest as strict JSON; raise ``StorageError`` if it is too large to read.

        Its last member is the seal: the SHA-256 of all that is before it, byte for byte.
        """
        facts = attrs.asdict(self) | {"tags": list(self.tags)}
        facts["metrics"] = {name: jsontext.mark(value) for name, value in self.metrics.items()}
        head = jsontext.dump(facts, indent=1).removesuffix(b"\n}\n")
        text = head + _SEAL + _ending(head)
        jsontext.check_size(NAME, text, _LIMIT)
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
            found = files.measure(folder / name)
        except OSError as error:
            raise Unsound(f"{name} cannot be read: {error.strerror}") from error
        if found != seal:
            raise Unsound(f"{name} was changed after it was written (its sha256 differs)")


def _ending(head: bytes) -> bytes:
    return hashlib.sha256(head).hexdigest().encode() + b'"\n}\n'


def _read(folder: Path) -> Manifest:
    try:
        data = files.read(folder / NAME, _LIMIT)
        head, sealed, ending = data.rpartition(_SEAL)
        if sealed and ending != _ending(head):
            raise ValueError("was changed after it was written (its seal does not match)")  # noqa: TRY301
        facts = jsontext.parse(data)
        _check_format(facts, bool(sealed))
        return _parse(facts)
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


def _check_format(facts: Any, sealed: bool) -> None:
    version = facts.get("format") if isinstance(facts, dict) else None
    if version is None or not _is_count(version) or version < 1:
        raise ValueError("tells no format")
    if version > FORMAT:
        raise Newer(
            f"it has format {version}, and this version of fundamentallm-checkpoint reads formats"
            f" 1 to {FORMAT}: pip install --upgrade fundamentallm-checkpoint"
        )
    if version > 1 and not sealed:
        raise ValueError("was changed after it was written (its seal is missing)")


def _parse(facts: dict[str, Any]) -> Manifest:
    facts = {"contents": ALL} | facts
    kinds = {
        "run": str,
        "created": (int, float),
        "settings": str,
        "data": str,
        "metrics": dict,
        "tags": list,
        "contents": str,
        "finite": bool,
        "files": dict,
    }
    untold = [n for n, kind in kinds.items() if not isinstance(facts.get(n), kind)]  # type: ignore[arg-type]
    untold += [] if _is_count(facts.get("step")) else ["step"]
    if untold:
        raise ValueError(f"tells no {', '.join(untold)}")
    kept = {name: facts[name] for name in (*kinds, "step", "format")}
    kept["tags"] = tuple(str(tag) for tag in kept["tags"])
    kept["metrics"] = {name: _number(value) for name, value in kept["metrics"].items()}
    kept["files"] = {name: _seal(name, seal) for name, seal in kept["files"].items()}
    if kept["contents"] not in _REQUIRED:
        raise ValueError(f"tells contents of an unknown kind, {kept['contents']!r}")
    missing = [name for name in _REQUIRED[kept["contents"]] if name not in kept["files"]]
    if missing:
        raise ValueError(f"lists no {', '.join(missing)}")
    return Manifest(**kept)


def _number(value: Any) -> float:
    if isinstance(value, dict) and value.keys() == {"$float"}:
        return jsontext.unmark(value["$float"])
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("has a metric that is no number")  # noqa: TRY004 - the file is wrong
    try:
        return float(value)
    except OverflowError:
        raise ValueError("has a metric that no float can hold") from None


def _seal(name: str, facts: Any) -> Seal:
    if name != Path(name).name or name.startswith(".") or "\0" in name:
        raise ValueError(f"lists {name!r}, which is not a plain file name")
    size, sha256 = (facts.get("size"), facts.get("sha256")) if isinstance(facts, dict) else (0, 0)
    if not _is_count(size) or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError(f"does not tell size and sha256 of {name}")
    return Seal(size, sha256)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
