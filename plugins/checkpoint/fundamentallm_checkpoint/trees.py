"""Trees of JSON values and tensors, as strict JSON and a table of tensors; and back, exactly.

What JSON has no word for is a table with one key: ``{"$tensor": name}``, ``{"$float": "nan"}``,
``{"$tuple": [...]}``, and ``{"$table": {...}}`` for a table that would look like one of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fundamentallm import StorageError
from fundamentallm_checkpoint import jsontext

if TYPE_CHECKING:
    from torch import Tensor


def split(tree: Any, tensors: dict[str, Tensor], path: tuple[str, ...] = ()) -> Any:
    """Return ``tree`` as JSON values; its tensors go into ``tensors``, under their paths.

    Raises ``StorageError`` naming the path of a value that is neither.
    """
    if tree is None or isinstance(tree, bool | int | str):
        return tree
    if isinstance(tree, float):
        return jsontext.mark(tree)
    if isinstance(tree, torch.Tensor):
        return {"$tensor": _add(tree, tensors, path)}
    where = "/".join(path[:8])
    if len(path) > jsontext.DEPTH:
        raise StorageError(f"{where}/…: a checkpoint holds no more than {jsontext.DEPTH} levels")
    if isinstance(tree, list | tuple):
        # A random generator's state is hundreds of numbers, and a step waits.
        is_plain = all(type(item) is int for item in tree)
        items = (
            list(tree)
            if is_plain
            else [split(item, tensors, (*path, str(i))) for i, item in enumerate(tree)]
        )
        return items if isinstance(tree, list) else {"$tuple": items}
    if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
        table = {key: split(item, tensors, (*path, key)) for key, item in tree.items()}
        return {"$table": table} if _is_mark(table) else table
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
    if mark == "$float":
        return jsontext.unmark(content)
    if mark == "$tuple" and isinstance(content, list):
        return tuple(join(item, tensors) for item in content)
    if mark == "$table" and isinstance(content, dict):
        return {key: join(item, tensors) for key, item in content.items()}
    raise ValueError(f"the mark {mark!r} means nothing here")


def _is_mark(table: dict[str, Any]) -> bool:
    return len(table) == 1 and next(iter(table)).startswith("$")


def _kind(value: Any) -> str:
    return "a table with keys that are no strings" if isinstance(value, dict) else repr(type(value))
