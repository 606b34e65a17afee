"""The manifest of a checkpoint, written last: its facts, its files, and how to verify them."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any, TypeGuard

import attrs

from fundamentallm_checkpoint.storage import durable_files, strict_json
from fundamentallm_checkpoint.storage.durable_files import FileDigest

FORMAT = 1
"""Raised when older versions of this plugin cannot read what a newer one writes. Every version
reads all formats up to its own."""

NAME = "manifest.json"
ALL, MODEL = "all", "model"
_REQUIRED = {
    ALL: ("model.safetensors", "optimizer.safetensors", "state.json"),
    MODEL: ("model.safetensors", "state.json"),
}
_LIMIT = 2**20  # bytes
# Eight digits, so that names sort by step; eighteen always fit into 64 bits.
_FOLDER = re.compile(r"step-(\d{8,18})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SEAL = b',\n "seal": "'
_TYPES = {
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


class UnsoundError(Exception):
    """A checkpoint is incomplete or was changed; ``str()`` says how."""


class NewerFormatError(UnsoundError):
    """A checkpoint that only a newer version of this plugin can read."""


class NoMemoryError(UnsoundError):
    """A checkpoint that may be sound, but does not fit into the free memory."""


@attrs.frozen(kw_only=True)
class Manifest:
    """The facts about one checkpoint."""

    step: int
    run: str
    """The id of the run, drawn at random at its first start."""
    created: float
    """Unix time in seconds."""
    settings: str
    """SHA-256 of the run's ``settings.toml``; empty if there is none."""
    data: str
    """The fingerprint of the data source."""
    metrics: dict[str, float]
    """The metrics of exactly this step; empty if none were measured."""
    tags: tuple[str, ...] = ()
    contents: str = ALL
    """``"all"`` that resuming needs, or ``"model"`` for the weights only."""
    finite: bool = True
    """Whether weights and optimizer state are free of NaN and infinity."""
    files: dict[str, FileDigest] = attrs.field(factory=dict)
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """A hash of the content of all its files: SHA-256 of their names and their SHA-256."""
        lines = [f"{name} {seal.sha256}\n" for name, seal in sorted(self.files.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def size(self) -> int:
        """The bytes of all its files."""
        return sum(file.size for file in self.files.values())

    def tagged(self, *tags: str) -> Manifest:
        """Return the same manifest with these tags."""
        return attrs.evolve(self, tags=tags)

    def to_json(self) -> bytes:
        """Return the manifest as strict JSON; raise ``StorageError`` if it is too large to read.

        The last member is the seal: the SHA-256 of all bytes before it.
        """
        facts = attrs.asdict(self) | {"tags": list(self.tags)}
        metrics = {name: strict_json.float_to_json(value) for name, value in self.metrics.items()}
        head = strict_json.dump(facts | {"metrics": metrics}, indent=1).removesuffix(b"\n}\n")
        text = head + _SEAL + _ending(head)
        strict_json.check_size(NAME, text, _LIMIT)
        return text

    def score(self, monitor: str, mode: str) -> float:
        """Return the metric so that smaller is better; infinity if it is unknown or NaN."""
        value = self.metrics.get(monitor, math.nan)
        if math.isnan(value) or not self.finite:
            return math.inf
        return value if mode == "min" else -value


def folder_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's folder name, or None for any other name."""
    found = _FOLDER.fullmatch(name)
    return int(found[1]) if found else None


def read(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and compare the sizes of its files.

    Raises ``UnsoundError``, and ``NewerFormatError`` if a newer version of this plugin wrote it.
    """
    manifest = _read(folder)
    if manifest.step != step_of(folder.name):
        raise UnsoundError(f"{NAME} is one of step {manifest.step}")
    check_sizes(folder, manifest)
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise ``UnsoundError`` if a file is missing or has another size; no file is opened."""
    for name, file in manifest.files.items():
        path = folder / name
        try:
            # Not ``stat``: a link could lead out of the checkpoint.
            found = path.lstat()
        except OSError as error:
            raise UnsoundError(f"{name} cannot be read: {error.strerror}") from error
        if path.is_symlink() or not path.is_file():
            raise UnsoundError(f"{name} is not a regular file")
        if found.st_size != file.size:
            raise UnsoundError(f"{name} has {found.st_size:,} bytes instead of {file.size:,}")


def owner(folder: Path) -> str | None:
    """Return the id of the run that a checkpoint belongs to; None if its manifest is unreadable."""
    try:
        return _read(folder).run
    except UnsoundError:
        return None


def verify(folder: Path, manifest: Manifest) -> None:
    """Read every file of a checkpoint; raise ``UnsoundError`` if one byte was changed."""
    for name, file in manifest.files.items():
        try:
            found = durable_files.digest(folder / name)
        except OSError as error:
            raise UnsoundError(f"{name} cannot be read: {error.strerror}") from error
        if found != file:
            raise UnsoundError(f"{name} was changed after it was written (its sha256 differs)")


def _ending(head: bytes) -> bytes:
    return hashlib.sha256(head).hexdigest().encode() + b'"\n}\n'


def _read(folder: Path) -> Manifest:
    try:
        data = durable_files.read(folder / NAME, _LIMIT)
        head, sealed, ending = data.rpartition(_SEAL)
        if sealed and ending != _ending(head):
            raise ValueError("was changed after it was written (its seal does not match)")  # noqa: TRY301
        facts = strict_json.parse(data)
        _check_format(facts)
        # After the format: the message about a newer version helps more than one about the seal.
        if not sealed:
            raise ValueError("was changed after it was written (its seal is missing)")  # noqa: TRY301
        return _parse(facts)
    except FileNotFoundError:
        raise UnsoundError(f"{NAME} is missing") from None
    except OSError as error:
        raise UnsoundError(f"{NAME} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UnsoundError(f"{NAME} {error}") from error


def _check_format(facts: Any) -> None:
    version = facts.get("format") if isinstance(facts, dict) else None
    if version is None or not _is_count(version) or version < 1:
        raise ValueError("has no format")
    if version > FORMAT:
        known = "format 1" if FORMAT == 1 else f"formats 1 to {FORMAT}"
        raise NewerFormatError(
            f"it has format {version}, and this version of fundamentallm-checkpoint reads {known}:"
            " pip install --upgrade fundamentallm-checkpoint"
        )


def _parse(facts: dict[str, Any]) -> Manifest:
    missing = [name for name, kind in _TYPES.items() if not isinstance(facts.get(name), kind)]  # type: ignore[arg-type]
    missing += [] if _is_count(facts.get("step")) else ["step"]
    if missing:
        raise ValueError(f"has no valid {', '.join(missing)}")
    # Other keys are ignored, so a newer version can add one without a new format.
    kept = {name: facts[name] for name in (*_TYPES, "step", "format")}
    kept["tags"] = tuple(str(tag) for tag in kept["tags"])
    kept["metrics"] = {name: _number(value) for name, value in kept["metrics"].items()}
    kept["files"] = {name: _digest(name, digest) for name, digest in kept["files"].items()}
    if kept["contents"] not in _REQUIRED:
        raise ValueError(f"has unknown contents {kept['contents']!r}")
    unlisted = [name for name in _REQUIRED[kept["contents"]] if name not in kept["files"]]
    if unlisted:
        raise ValueError(f"does not list {', '.join(unlisted)}")
    return Manifest(**kept)


def _number(value: Any) -> float:
    if isinstance(value, dict) and value.keys() == {"$float"}:
        return strict_json.float_from_json(value["$float"])
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("has a metric that is not a number")  # noqa: TRY004 - the file is wrong
    try:
        return float(value)
    except OverflowError:
        raise ValueError("has a metric that is too large for a float") from None


def _digest(name: str, facts: Any) -> FileDigest:
    # A name with a folder in it could lead out of the checkpoint.
    if name != Path(name).name or name.startswith(".") or "\0" in name:
        raise ValueError(f"lists {name!r}, which is not a plain file name")
    size, sha256 = (facts.get("size"), facts.get("sha256")) if isinstance(facts, dict) else (0, 0)
    if not _is_count(size) or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError(f"has no valid size and sha256 of {name}")
    return FileDigest(size, sha256)


def _is_count(value: Any) -> TypeGuard[int]:
    # bool is an int in Python, and is none here.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
