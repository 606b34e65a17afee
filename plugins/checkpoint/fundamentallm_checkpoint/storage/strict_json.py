"""Strict JSON of limited size: what is not plain and finite is refused, when read and written.

A number that JSON cannot write is a table: ``{"$float": "nan"}``.
"""

from __future__ import annotations

import json
import math
from typing import Any

from fundamentallm import StorageError

# Far below Python's recursion limit, so that what was written can be read back.
DEPTH = 100
"""Levels of tables and lists that a tree may have."""


def dump(value: Any, indent: int | None = None) -> bytes:
    """Return JSON values as ASCII text; floats are read back exactly."""
    return json.dumps(value, indent=indent, allow_nan=False).encode("ascii") + b"\n"


def parse(data: bytes) -> Any:
    """Return the value of a JSON text; raise ``ValueError`` if it is not strict JSON."""
    try:
        return json.loads(
            data,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            object_pairs_hook=_table_of_unique_keys,
        )
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def check_size(name: str, data: bytes, limit: int) -> None:
    """Raise ``StorageError`` for content that is too large to be read back."""
    if len(data) > limit:
        raise StorageError(
            f"{name} would have {len(data):,} bytes, and at most {limit:,} can be read back: a"
            " plugin keeps too much in its state; keep large values as tensors"
        )


def float_to_json(number: float) -> float | dict[str, str]:
    """Return a float as a JSON value; NaN and the infinities become a ``$float`` table."""
    return number if math.isfinite(number) else {"$float": repr(float(number))}


def float_from_json(content: Any) -> float:
    """Return the float that the content of a ``$float`` table names."""
    if content in ("nan", "inf", "-inf"):
        return float(content)
    raise ValueError(f"'$float' does not know {content!r}")


def _refuse_constant(text: str) -> float:
    # Python's reader accepts NaN and Infinity; those of other languages do not.
    raise ValueError(f"holds {text}, which is not JSON")


def _finite_float(text: str) -> float:
    # ``float`` makes an infinity of 1e999, without an error.
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"holds {text}, which is too large for a float")
    return value


def _table_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Python's reader takes the last of two equal keys, others may take the first.
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("has a key twice")
    return table
