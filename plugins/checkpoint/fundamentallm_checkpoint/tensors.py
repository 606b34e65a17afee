"""Named tensors in a safetensors file: a stream that is hashed on its way, both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from fundamentallm import StorageError
from fundamentallm_checkpoint import headers, memory, poison
from fundamentallm_checkpoint.files import Seal, Sink, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from torch import Tensor

    from fundamentallm_checkpoint.headers import Entry


@attrs.frozen
class Written:
    """A finished file of tensors. ``poisoned``: names of those that hold NaN or infinity."""

    seal: Seal
    poisoned: list[str]


def write(
    path: Path,
    tensors: dict[str, Tensor],
    told: Callable[[int], None] | None = None,
    may_be_infinite: Collection[str] = (),
) -> Written:
    """Write tensors of any layout in memory, on any device, one after another.

    Names of one and the same tensor (tied weights) share one entry; the further names are listed
    as JSON under ``aliases`` in the file's metadata. The same tensors always give the same bytes.
    ``told`` hears the bytes of every tensor that is written. ``may_be_infinite`` names those that
    only NaN poisons. Raises ``StorageError`` for a tensor that the format has no word for.
    """
    check(tensors)
    owned = owners(tensors)
    # Wide elements first, so that each tensor starts at a multiple of its element's size.
    order = sorted(set(owned.values()), key=lambda n: (-tensors[n].element_size(), n))
    aliases = {name: owner for name, owner in sorted(owned.items()) if name != owner}
    poisoned = []
    with Sink(path) as sink:
        sink.write(headers.write({name: tensors[name] for name in order}, aliases))
        for name in order:
            # Moved one by one: the host never holds a copy of more than one tensor.
            flat = _flat(tensors[name])
            data = flat.view(torch.uint8).numpy() if flat.numel() else None
            if data is not None:
                if poison.found(data, flat.dtype, infinite=name not in may_be_infinite):
                    poisoned.append(name)
                sink.write(data.data)
            if told is not None:
                told(flat.nbytes)
        return Written(sink.seal(), poisoned)


def read(path: Path, seal: Seal | None = None) -> dict[str, Tensor]:
    """Read a file into memory of its own, once; raise ``ValueError`` if it is not a sound one, or
    not the one that ``seal`` tells, and ``MemoryError`` if there is no room for its tensors."""
    with Source(path) as source:
        if seal is not None and source.size != seal.size:
            raise ValueError(f"has {source.size:,} bytes instead of {seal.size:,}")
        try:
            found = _read(source)
        except ValueError as error:
            raise ValueError(f"is not a sound safetensors file: {error}") from error
        if seal is not None and source.seal() != seal:
            raise ValueError("was changed after it was written (its sha256 differs)")
        return found


def size(tensors: dict[str, Tensor]) -> int:
    """Return the bytes that the tensors take, those of aliases once."""
    return sum(tensors[name].nbytes for name in set(owners(tensors).values()))


def check(tensors: dict[str, Tensor]) -> None:
    """Raise ``StorageError`` for a tensor that a file cannot hold."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
            kind = f"{tensor.layout} on {tensor.device}"
            raise StorageError(f"{name}: a safetensors file holds dense tensors only, not {kind}")
        if tensor.dtype not in headers.CODES:
            raise StorageError(f"{name}: a safetensors file cannot hold {tensor.dtype}")


def owners(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Map each name to the first one, in alphabetical order, of the very same tensor."""
    first: dict[object, str] = {}
    return {n: first.setdefault(_identity(tensors[n], n), n) for n in sorted(tensors)}


def _identity(tensor: Tensor, name: str) -> object:
    if tensor.numel() == 0:  # nothing in memory to share
        return name
    place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
    return place, tensor.shape, tensor.stride()


def _flat(tensor: Tensor) -> Tensor:
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # A tensor of one element counts as contiguous whatever its stride, and views mind.
    return dense.as_strided((dense.numel(),), (1,))


def _read(source: Source) -> dict[str, Tensor]:
    header = headers.read(source)
    memory.check(sum(entry.size for entry in header.entries.values()))
    found = {name: _tensor(source, entry) for name, entry in header.entries.items()}
    return found | {name: found[owner] for name, owner in header.aliases.items()}


def _tensor(source: Source, entry: Entry) -> Tensor:
    try:
        made = torch.empty(entry.shape, dtype=entry.dtype)
    except RuntimeError as error:  # a limit of the process
        raise MemoryError(f"holds a tensor of {entry.size:,} bytes, too many") from error
    if entry.size:
        source.fill(made.view(-1).view(torch.uint8).numpy().data)
    return made
