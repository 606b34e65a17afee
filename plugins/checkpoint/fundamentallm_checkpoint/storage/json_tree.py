"""Trees of JSON values and tensors as strict JSON and a table of tensors; and back, exactly.

Four markers stand for what JSON cannot write. Each is a table with one key:
``{"$tensor": name}``, ``{"$float": "nan"}``, ``{"$tuple": [...]}``, and ``{"$table": {...}}`` for a
table that looks like a marker itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fundamentallm import StorageError
from fundamentallm_checkpoint.storage import strict_json

if TYPE_CHECKING:
    from torch import Tensor


def split(tree: Any, tensors: dict[str, Tensor], path: tuple[str, ...] = ()) -> Any:
    """Return ``tree`` as JSON values; add its tensors to ``tensors`` under their paths.

    Raises ``StorageError`` with the path of a value that is neither.
    """
    if tree is None or isinstance(tree, bool | int | str):
        return tree
    if isinstance(tree, float):
        return strict_json.float_to_json(tree)
    if isinstance(tree, torch.Tensor):
        return {"$tensor": _add(tree, tensors, path)}
    where = "/".join(path[:8])
    if len(path) > strict_json.DEPTH:
        raise StorageError(f"{where}/…: a checkpoint has at most {strict_json.DEPTH} levels")
    if isinstance(tree, list | tuple):
        # A shortcut for long lists of numbers (token counts, say): the training step waits.
        is_plain = all(type(item) is int for item in tree)
        items = (
            list(tree)
            if is_plain
            else [split(item, tensors, (*path, str(i))) for i, item in enumerate(tree)]
        )
        return items if isinstance(tree, list) else {"$tuple": items}
    if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
        table = {key: split(item, tensors, (*path, key)) for key, item in tree.items()}
        return {"$table": table} if _is_marker(table) else table
    raise StorageError(
        f"{where}: a checkpoint can store JSON values and tensors, not {_kind(tree)}"
    )


def join(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo ``split``; raise ``ValueError`` for an unknown marker or tensor."""
    if isinstance(value, list):
        return [join(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if not _is_marker(value):
        return {key: join(item, tensors) for key, item in value.items()}
    return _resolve(*next(iter(value.items())), tensors)


def _add(tensor: Tensor, tensors: dict[str, Tensor], path: tuple[str, ...]) -> str:
    # Two paths can give one name ("a/b" next to "a" -> "b"), and a header holds ASCII only: so the
    # marker holds the name that was really used.
    name = "/".join(("state", *path)).encode("ascii", "backslashreplace").decode("ascii")
    while name in tensors:
        name += "'"
    tensors[name] = tensor
    return name


def _resolve(marker: str, content: Any, tensors: dict[str, Tensor]) -> Any:
    if marker == "$tensor" and isinstance(content, str) and content in tensors:
        return tensors[content]
    if marker == "$float":
        return strict_json.float_from_json(content)
    if marker == "$tuple" and isinstance(content, list):
        return tuple(join(item, tensors) for item in content)
    if marker == "$table" and isinstance(content, dict):
        return {key: join(item, tensors) for key, item in content.items()}
    raise ValueError(f"the marker {marker!r} is unknown or its content is wrong")


def _is_marker(table: dict[str, Any]) -> bool:
    return len(table) == 1 and next(iter(table)).startswith("$")


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return "a table whose keys are not all strings"
    return repr(type(value))
