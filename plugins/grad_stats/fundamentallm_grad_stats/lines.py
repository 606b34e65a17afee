"""The file of histograms: a line of JSON for each measured step."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fundamentallm import StorageError, write_durably

if TYPE_CHECKING:
    from pathlib import Path


def append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append lines, in one write. Raises ``StorageError``."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    try:
        with path.open("ab", buffering=0) as file:
            file.write(text.encode())
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error


def drop_after(step: int, path: Path) -> None:
    """Drop the lines of later steps, which will be repeated, and an incomplete line."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _belongs(line, step)]
    if kept != lines:
        write_durably(path, b"".join(kept))


def _belongs(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and bool(json.loads(line)["step"] <= step)
    except (ValueError, TypeError, KeyError):
        return False
