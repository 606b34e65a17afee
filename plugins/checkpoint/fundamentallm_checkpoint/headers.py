"""The header of a safetensors file: which tensors it holds, and where; written and checked.

The format: 8 bytes with the header's length, the header in JSON, then the tensors side by side.
See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs
import torch

from fundamentallm import StorageError
from fundamentallm_checkpoint import jsontext

if TYPE_CHECKING:
    from torch import Tensor

    from fundamentallm_checkpoint.files import Source

LIMIT = 2**25
"""Bytes of the largest header that is written or read: a quarter of a million tensors."""

_ALIASES = "aliases"
_RESERVED = "__metadata__"
_MOST = 2**62
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
_KINDS = {code: dtype for dtype, code in CODES.items()}


@attrs.frozen
class Entry:
    """One tensor of a file: what it is, and how many bytes it takes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int


@attrs.frozen
class Header:
    """The tensors of a file in the order of their bytes, and further names of some of them."""

    entries: dict[str, Entry]
    aliases: dict[str, str]


def write(tensors: dict[str, Tensor], aliases: dict[str, str]) -> bytes:
    """Return the header of a file with these tensors, in this order."""
    more = {_ALIASES: jsontext.dump(aliases).decode().strip()} if aliases else {}
    entries: dict[str, object] = {_RESERVED: {"format": "pt"} | more}
    start = 0
    for name, tensor in tensors.items():
        if name == _RESERVED:
            raise StorageError(f"a safetensors file cannot hold a tensor named {name!r}")
        end = start + tensor.nbytes
        code, shape = CODES[tensor.dtype], list(tensor.shape)
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = jsontext.dump(entries).strip()
    text += b" " * (-len(text) % 8)
    jsontext.check_size("the header of a safetensors file", text, LIMIT)
    return len(text).to_bytes(8, "little") + text


def read(source: Source) -> Header:
    """Read and check a header. The tensors it tells fill the file exactly: no memory is ever taken
    for what is not there. Raises ``ValueError`` for anything else."""
    length = int.from_bytes(source.take(8), "little")
    if length > LIMIT:
        raise ValueError(f"its header is larger than {LIMIT:,} bytes")
    facts = jsontext.parse(source.take(length))
    if not isinstance(facts, dict):
        raise ValueError("its header is no table")  # noqa: TRY004 - the file is wrong, no call
    metadata, end = facts.pop(_RESERVED, {}), 0
    entries = {}
    for name, entry in sorted(facts.items(), key=_place):
        entries[name] = _entry(name, entry, end)
        end += entries[name].size
    if end != source.size - length - 8:
        raise ValueError("its tensors do not fill the file")
    return Header(entries, _aliases(metadata, entries))


def _place(item: tuple[str, Any]) -> tuple[int, int]:
    name, entry = item
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets))):
        raise ValueError(f"does not tell where {name!r} is")
    return offsets[0], offsets[1]


def _entry(name: str, facts: dict[str, Any], start: int) -> Entry:
    begin, end = facts["data_offsets"]
    kind, shape = facts.get("dtype"), facts.get("shape")
    dtype = _KINDS.get(kind) if isinstance(kind, str) else None
    if dtype is None or not (isinstance(shape, list) and all(map(_is_count, shape))):
        raise ValueError(f"does not tell what {name!r} is")
    # Empty ones too: a count that no memory could hold must not reach the allocation.
    if math.prod(filter(None, shape)) > _MOST or begin != start:
        raise ValueError(f"{name!r} is not where or what it can be")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{name!r} has {end - begin} bytes, which its shape {shape} does not fit")
    return Entry(dtype, tuple(shape), end - begin)


def _aliases(metadata: Any, entries: dict[str, Entry]) -> dict[str, str]:
    text = metadata.get(_ALIASES, "{}") if isinstance(metadata, dict) else None
    aliases = jsontext.parse(text.encode()) if isinstance(text, str) else None
    if not isinstance(aliases, dict):
        raise ValueError("its aliases are no table")  # noqa: TRY004 - the file is wrong, no call
    for name, owner in aliases.items():
        if name in entries or not isinstance(owner, str) or owner not in entries:
            raise ValueError(f"its alias {name!r} of {owner!r} leads nowhere")
    return aliases


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST
