"""Named tensors in a safetensors file: streamed and hashed on the way, in both directions.

The format: 8 bytes with the header's length, the header as JSON, then the tensors one after
another. See https://github.com/huggingface/safetensors#format. The ``safetensors`` package is not
used, since it neither hashes while it writes nor syncs the file.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from fundamentallm import StorageError
from fundamentallm_checkpoint.storage import nonfinite, strict_json
from fundamentallm_checkpoint.storage.durable_files import (
    FileDigest,
    HashingReader,
    HashingWriter,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import Tensor

LIMIT = 2**25
"""Bytes of the largest header that is written or read: a quarter of a million tensors."""

_ALIASES = "aliases"
_RESERVED = "__metadata__"
_MAX_COUNT = 2**62
_CODES = {
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
_DTYPES = {code: dtype for dtype, code in _CODES.items()}

_MEMINFO = Path("/proc/meminfo")
# The limits of control groups, versions 2 and 1; a container sees its own under these names.
_MEMORY_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@attrs.frozen
class WrittenTensors:
    """A finished file of tensors. ``nonfinite``: names of those that hold NaN or infinity."""

    digest: FileDigest
    nonfinite: list[str]


@attrs.frozen
class _Entry:
    """The header's facts about one tensor; ``size`` is in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int


@attrs.frozen
class Memory:
    """Bytes of memory including swap: the total, and what is free or can be freed."""

    total: int
    free: int


def write(
    path: Path,
    tensors: dict[str, Tensor],
    report: Callable[[int], None] | None = None,
    may_be_infinite: Collection[str] = (),
) -> WrittenTensors:
    """Write tensors of any memory layout, on any device, one after another.

    Names of the same tensor (tied weights) share one entry; the further names are listed as JSON
    under ``aliases`` in the file's metadata. The same tensors always give the same bytes.
    ``report`` is called with the bytes of every tensor that was written. An infinity in one of
    ``may_be_infinite`` is accepted. Raises ``StorageError`` for a tensor that the format lacks.
    """
    check(tensors)
    owners = first_names(tensors)
    # Large elements first, so that each tensor starts at a multiple of its element's size.
    order = sorted(set(owners.values()), key=lambda n: (-tensors[n].element_size(), n))
    aliases = {name: owner for name, owner in sorted(owners.items()) if name != owner}
    bad = []
    with HashingWriter(path) as file:
        file.write(_header({name: tensors[name] for name in order}, aliases))
        for name in order:
            # One at a time, so that the host has a copy of at most one device tensor.
            flat = _flat(tensors[name])
            data = flat.view(torch.uint8).numpy() if flat.numel() else None
            if data is not None:
                infinite = name not in may_be_infinite
                if nonfinite.holds_nonfinite(data, flat.dtype, infinite=infinite):
                    bad.append(name)
                file.write(data.data)
            if report is not None:
                report(flat.nbytes)
        return WrittenTensors(file.sync(), bad)


def read(path: Path, digest: FileDigest | None = None) -> dict[str, Tensor]:
    """Read a file into new CPU tensors.

    Raises ``ValueError`` if it is not a valid file or differs from ``digest``, and
    ``MemoryError`` if its tensors do not fit into the free memory.
    """
    with HashingReader(path) as file:
        if digest is not None and file.size != digest.size:
            raise ValueError(f"has {file.size:,} bytes instead of {digest.size:,}")
        try:
            found = _read_tensors(file)
        except ValueError as error:
            raise ValueError(f"is not a sound safetensors file: {error}") from error
        if digest is not None and file.digest() != digest:
            raise ValueError("was changed after it was written (its sha256 differs)")
        return found


def size(tensors: dict[str, Tensor]) -> int:
    """Return the bytes of the tensors, counting tied ones once."""
    return sum(tensors[name].nbytes for name in set(first_names(tensors).values()))


def check(tensors: dict[str, Tensor]) -> None:
    """Raise ``StorageError`` for a tensor that a safetensors file cannot store."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
            kind = f"{tensor.layout} on {tensor.device}"
            raise StorageError(f"{name}: a safetensors file stores dense tensors only, not {kind}")
        if tensor.dtype not in _CODES:
            raise StorageError(f"{name}: a safetensors file cannot store {tensor.dtype}")


def first_names(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Map each name to the alphabetically first name of the same tensor."""
    first: dict[object, str] = {}
    return {n: first.setdefault(_identity(tensors[n], n), n) for n in sorted(tensors)}


def memory() -> Memory | None:
    """Return the memory that this process may use, or None where the system does not report it."""
    try:
        lines = [line.split() for line in _MEMINFO.read_text().splitlines()]
        known = {line[0]: 1024 * int(line[1]) for line in lines}
        found = (
            known["MemTotal:"] + known["SwapTotal:"],
            known["MemAvailable:"] + known["SwapFree:"],
        )
    except (OSError, LookupError, ValueError):
        return None
    limits = []
    for path in _MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # the text "max" means no limit
            limits.append(int(path.read_text()))
    return Memory(*(min(size, *limits) if limits else size for size in found))


def _check_memory(size: int) -> None:
    """Check before allocating: a sparse file may claim any size and really have it."""
    there = memory()
    if there is None:
        return
    if size > there.total:
        raise ValueError(
            f"its tensors would take {size:,} bytes, more than the {there.total:,} bytes of memory"
            " that this machine has"
        )
    if size > there.free:
        raise MemoryError(
            f"holds {size:,} bytes of tensors, and {there.free:,} bytes of memory are free"
        )


def _identity(tensor: Tensor, name: str) -> object:
    if tensor.numel() == 0:  # has no memory to share
        return name
    # Views of other shapes or strides are separate tensors: the format has no strides.
    place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
    return place, tensor.shape, tensor.stride()


def _flat(tensor: Tensor) -> Tensor:
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # A tensor of one element is contiguous with any stride, but ``view`` needs stride 1.
    return dense.as_strided((dense.numel(),), (1,))


def _header(tensors: dict[str, Tensor], aliases: dict[str, str]) -> bytes:
    """Return the length and the header of a file with these tensors in this order."""
    more = {_ALIASES: strict_json.dump(aliases).decode().strip()} if aliases else {}
    entries: dict[str, object] = {_RESERVED: {"format": "pt"} | more}
    start = 0
    for name, tensor in tensors.items():
        if name == _RESERVED:
            raise StorageError(f"a safetensors file cannot store a tensor named {name!r}")
        end = start + tensor.nbytes
        code, shape = _CODES[tensor.dtype], list(tensor.shape)
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = strict_json.dump(entries).strip()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    strict_json.check_size("the header of a safetensors file", text, LIMIT)
    return len(text).to_bytes(8, "little") + text


def _read_tensors(file: HashingReader) -> dict[str, Tensor]:
    entries, aliases = _read_header(file)
    _check_memory(sum(entry.size for entry in entries.values()))
    found = {name: _read_tensor(file, entry) for name, entry in entries.items()}
    return found | {name: found[owner] for name, owner in aliases.items()}


def _read_tensor(file: HashingReader, entry: _Entry) -> Tensor:
    try:
        made = torch.empty(entry.shape, dtype=entry.dtype)
    except RuntimeError as error:  # the process has a limit of its own
        raise MemoryError(f"holds a tensor of {entry.size:,} bytes, too many") from error
    if entry.size:
        file.fill(made.view(-1).view(torch.uint8).numpy().data)
    return made


def _read_header(file: HashingReader) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Read and check a header; return its tensors in the order of their bytes, and the aliases.

    The entries fill the file exactly, so no memory is allocated for bytes that are not there.
    """
    length = int.from_bytes(file.take(8), "little")
    if length > LIMIT:
        raise ValueError(f"its header is larger than {LIMIT:,} bytes")
    facts = strict_json.parse(file.take(length))
    if not isinstance(facts, dict):
        raise ValueError("its header is not a table")  # noqa: TRY004 - the file is wrong
    metadata, end = facts.pop(_RESERVED, {}), 0
    entries = {}
    for name, entry in sorted(facts.items(), key=_offsets):
        entries[name] = _entry(name, entry, end)
        end += entries[name].size
    if end != file.size - length - 8:
        raise ValueError("its tensors do not fill the file")
    return entries, _aliases(metadata, entries)


def _offsets(item: tuple[str, Any]) -> tuple[int, int]:
    name, entry = item
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets))):
        raise ValueError(f"has no valid offsets of {name!r}")
    return offsets[0], offsets[1]


def _entry(name: str, facts: dict[str, Any], start: int) -> _Entry:
    begin, end = facts["data_offsets"]
    code, shape = facts.get("dtype"), facts.get("shape")
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None or not (isinstance(shape, list) and all(map(_is_count, shape))):
        raise ValueError(f"has no valid dtype and shape of {name!r}")
    # Zeros are left out: torch would refuse the product of the others even for an empty tensor.
    if math.prod(filter(None, shape)) > _MAX_COUNT or begin != start:
        raise ValueError(f"has a shape or offsets of {name!r} that cannot be")
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{name!r} has {end - begin} bytes, which its shape {shape} does not fit")
    return _Entry(dtype, tuple(shape), end - begin)


def _aliases(metadata: Any, entries: dict[str, _Entry]) -> dict[str, str]:
    text = metadata.get(_ALIASES, "{}") if isinstance(metadata, dict) else None
    aliases = strict_json.parse(text.encode()) if isinstance(text, str) else None
    if not isinstance(aliases, dict):
        raise ValueError("its aliases are not a table")  # noqa: TRY004 - the file is wrong
    for name, owner in aliases.items():
        if name in entries or not isinstance(owner, str) or owner not in entries:
            raise ValueError(f"its alias {name!r} of {owner!r} names no tensor")
    return aliases


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT
