"""The file of histograms: a line of JSON for each measured step."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def append(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append lines, in one write."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())


def drop_after(step: int, path: Path) -> None:
    """Drop the lines of later steps, which will be made again, and one that was cut short."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _belongs(line, step)]
    if kept != lines:
        beside = path.with_name(f".{path.name}")
        with beside.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)


def _belongs(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and bool(json.loads(line)["step"] <= step)
    except (ValueError, TypeError, KeyError):
        return False
