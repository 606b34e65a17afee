"""Trees of JSON values and tensors, as strict JSON and a table of tensors; and back, exactly.

What JSON has no word for is a table with one key: ``{"$tensor": name}``, ``{"$float": "nan"}``,
``{"$tuple": [...]}``, and ``{"$table": {...}}`` for a table that would look like one of these.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch

from fundamentallm import StorageError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def split(tree: Any, tensors: dict[str, Tensor], path: tuple[str, ...] = ()) -> Any:
    """Return ``tree`` as JSON values; its tensors go into ``tensors``, under their paths.

    Raises ``StorageError`` naming the path of a value that is neither.
    """
    if tree is None or isinstance(tree, bool | int | str):
        return tree
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else {"$float": repr(float(tree))}
    if isinstance(tree, torch.Tensor):
        return {"$tensor": _add(tree, tensors, path)}
    if isinstance(tree, list | tuple):
        items = [split(item, tensors, (*path, str(i))) for i, item in enumerate(tree)]
        return items if isinstance(tree, list) else {"$tuple": items}
    if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
        table = {key: split(item, tensors, (*path, key)) for key, item in tree.items()}
        return {"$table": table} if _is_mark(table) else table
    where = "/".join(path)
    raise StorageError(f"{where}: a checkpoint holds JSON values and tensors, not {_kind(tree)}")


def join(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo ``split``; raise ``ValueError`` for a mark or a tensor that is unknown."""
    if isinstance(value, list):
        return [join(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if not _is_mark(value):
        return {key: join(item, tensors) for key, item in value.items()}
    return _resolve(*next(iter(value.items())), tensors)


def to_json(value: Any, indent: int | None = None) -> bytes:
    """Write what ``split`` returned as ASCII JSON; floats come back exactly."""
    return json.dumps(value, indent=indent, allow_nan=False).encode("ascii") + b"\n"


def check_size(name: str, data: bytes, limit: int) -> None:
    """Raise ``StorageError`` for a file that ``read_json`` would refuse to read back."""
    if len(data) > limit:
        raise StorageError(
            f"{name} would have {len(data):,} bytes, and at most {limit:,} can be read back: a"
            " plugin keeps too much in its state; what is large belongs in tensors"
        )


def read_json(path: Path, limit: int) -> Any:
    """Read a file of at most ``limit`` bytes; raise ``ValueError`` if it is not strict JSON."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"is larger than {limit:,} bytes")
    try:
        return json.loads(
            data, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_table
        )
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def _add(tensor: Tensor, tensors: dict[str, Tensor], path: tuple[str, ...]) -> str:
    # Paths can meet ("a/b" beside "a" -> "b"), and what is no character cannot be in a file's
    # header: the mark holds the name that the tensor really got.
    name = "/".join(("state", *path)).encode("ascii", "backslashreplace").decode("ascii")
    while name in tensors:
        name += "'"
    tensors[name] = tensor
    return name


def _resolve(mark: str, content: Any, tensors: dict[str, Tensor]) -> Any:
    if mark == "$tensor" and isinstance(content, str) and content in tensors:
        return tensors[content]
    if mark == "$float" and content in ("nan", "inf", "-inf"):
        return float(content)
    if mark == "$tuple" and isinstance(content, list):
        return tuple(join(item, tensors) for item in content)
    if mark == "$table" and isinstance(content, dict):
        return {key: join(item, tensors) for key, item in content.items()}
    raise ValueError(f"the mark {mark!r} means nothing here")


def _is_mark(table: dict[str, Any]) -> bool:
    return len(table) == 1 and next(iter(table)).startswith("$")


def _kind(value: Any) -> str:
    return "a table with keys that are no strings" if isinstance(value, dict) else repr(type(value))


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
