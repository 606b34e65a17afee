"""Strict JSON of bounded size: what is not plain, finite, and small is refused, both ways.

Numbers that JSON has no word for are tables: ``{"$float": "nan"}``.
"""

from __future__ import annotations

import json
import math
from typing import Any

from fundamentallm import StorageError

DEPTH = 100
"""Levels of tables and lists that a tree may have."""


def dump(value: Any, indent: int | None = None) -> bytes:
    """Write JSON values as ASCII; floats come back exactly."""
    return json.dumps(value, indent=indent, allow_nan=False).encode("ascii") + b"\n"


def parse(data: bytes) -> Any:
    """Read JSON; raise ``ValueError`` if it is not strict, or holds a key twice."""
    try:
        return json.loads(
            data, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_table
        )
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def check_size(name: str, data: bytes, limit: int) -> None:
    """Raise ``StorageError`` for a file that is too large to be read back."""
    if len(data) > limit:
        raise StorageError(
            f"{name} would have {len(data):,} bytes, and at most {limit:,} can be read back: a"
            " plugin keeps too much in its state; what is large belongs in tensors"
        )


def mark(number: float) -> float | dict[str, str]:
    """Return what stands for a float in JSON."""
    return number if math.isfinite(number) else {"$float": repr(float(number))}


def unmark(content: Any) -> float:
    """Return the float that a mark's content means."""
    if content in ("nan", "inf", "-inf"):
        return float(content)
    raise ValueError(f"the mark '$float' means nothing with {content!r}")


def _refuse(text: str) -> float:
    raise ValueError(f"holds {text}, which is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds {text}, which no float can")
    return value


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("holds a key twice")
    return table
