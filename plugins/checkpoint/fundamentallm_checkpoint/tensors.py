"""Named tensors in a safetensors file: written as a stream that is hashed on its way."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import attrs
import torch
from safetensors import SafetensorError, safe_open

from fundamentallm import StorageError
from fundamentallm_checkpoint.files import Seal, Sink

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

_ALIASES = "aliases"
_RESERVED = "__metadata__"
_SLICE = 2**22
_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip


@attrs.frozen
class Written:
    """A finished file of tensors. ``poisoned``: names of those that hold NaN or infinity."""

    seal: Seal
    poisoned: list[str]


def write(path: Path, tensors: dict[str, Tensor]) -> Written:
    """Write tensors of any layout in memory, on any device, one after another.

    Names of one and the same tensor (tied weights) share one entry; the further names are listed
    as JSON under ``aliases`` in the file's metadata. The same tensors always give the same bytes.
    Raises ``StorageError`` for a tensor that the format has no word for.
    """
    for name, tensor in tensors.items():
        _check(name, tensor)
    owners = _owners(tensors)
    # Wide elements first, so that each tensor starts at a multiple of its element's size.
    order = sorted(set(owners.values()), key=lambda n: (-tensors[n].element_size(), n))
    aliases = {name: owner for name, owner in sorted(owners.items()) if name != owner}
    poisoned = []
    with Sink(path) as sink:
        sink.write(_header({name: tensors[name] for name in order}, aliases))
        for name in order:
            # Moved one by one: the host never holds a copy of more than one tensor.
            flat = _flat(tensors[name])
            if not _is_finite(flat):
                poisoned.append(name)
            if flat.numel():
                sink.write(flat.view(torch.uint8).numpy().data)
        return Written(sink.seal(), poisoned)


def read(path: Path) -> dict[str, Tensor]:
    """Read a file back into memory of its own; raise ``ValueError`` if it is not a sound one."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # A tensor of the library may be the file itself, mapped; a deleted checkpoint would
            # then go on filling the disk.
            found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            aliases = json.loads((file.metadata() or {}).get(_ALIASES, "{}"))
    except (SafetensorError, OSError, RecursionError) as error:
        raise ValueError(f"not a sound safetensors file: {error}") from error
    owners = aliases if isinstance(aliases, dict) else {str(aliases): None}
    for name, owner in owners.items():
        if name in found or owner not in found:
            raise ValueError(f"its alias {name!r} of {owner!r} leads nowhere")
    return found | {name: found[owner] for name, owner in aliases.items()}


def size(tensors: dict[str, Tensor]) -> int:
    """Return the bytes that the tensors take, those of aliases once."""
    return sum(tensors[name].nbytes for name in set(_owners(tensors).values()))


def _check(name: str, tensor: Tensor) -> None:
    if name == _RESERVED:
        raise StorageError(f"a safetensors file cannot hold a tensor named {name!r}")
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
        kind = f"{tensor.layout} on {tensor.device}"
        raise StorageError(f"{name}: a safetensors file holds dense tensors only, not {kind}")
    if tensor.dtype not in _CODES:
        raise StorageError(f"{name}: a safetensors file cannot hold {tensor.dtype}")


def _owners(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Map each name to the first one, in alphabetical order, of the very same tensor."""
    first: dict[object, str] = {}
    return {n: first.setdefault(_identity(tensors[n], n), n) for n in sorted(tensors)}


def _identity(tensor: Tensor, name: str) -> object:
    if tensor.numel() == 0:  # nothing in memory to share
        return name
    place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
    return place, tensor.shape, tensor.stride()


def _header(tensors: dict[str, Tensor], aliases: dict[str, str]) -> bytes:
    metadata = {"format": "pt"} | ({_ALIASES: json.dumps(aliases)} if aliases else {})
    entries: dict[str, object] = {_RESERVED: metadata}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        code, shape = _CODES[tensor.dtype], list(tensor.shape)
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _flat(tensor: Tensor) -> Tensor:
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # A tensor of one element counts as contiguous whatever its stride, and views mind.
    return dense.as_strided((dense.numel(),), (1,))


def _is_finite(flat: Tensor) -> bool:
    # The extremes tell it, NaN included, in one pass that copies nothing: ten times the speed
    # of asking every number.
    extremes = [end for part in _inexact_parts(flat) for end in torch.aminmax(part)]
    return all(bool(torch.isfinite(end)) for end in extremes)


def _inexact_parts(flat: Tensor) -> Iterator[Tensor]:
    if flat.numel() == 0 or not (flat.is_floating_point() or flat.is_complex()):
        return
    if flat.is_complex():
        yield torch.view_as_real(flat)
    elif flat.element_size() == 1:
        # No arithmetic on eight bits: widen them, a slice at a time.
        yield from (part.float() for part in torch.split(flat, _SLICE))
    else:
        yield flat
