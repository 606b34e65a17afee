"""Host memory in which a snapshot waits to be written while the run goes on."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any

import attrs
import torch

from fundamentallm_checkpoint import tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from fundamentallm_checkpoint.contents import Packed

_ALIGNMENT = 64
_PAGE = 2**12
_ROOM = 2**16
_PORTABLE = 1  # cudaHostRegisterPortable: for all devices, whichever is the current one
_CHUNK = 2**23
_LARGE = 2**20
_COPIERS = 4
_WORTH = 2**24  # a smaller memory is there at once


class Arena:
    """One block of memory, as large as what is saved, that every save uses again.

    Memory that is used for the first time costs several times a copy: the system has to find every
    page. So the block can be made ready beside the steps, and stays. With ``pinned`` the device
    copies into it at its full speed. Not for two threads at once.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._memory: Tensor | None = None
        self._pinned = pinned
        self._registered = False
        self._maker: threading.Thread | None = None

    def reserve(self, size: int) -> None:
        """Begin to make memory for ``size`` bytes ready in a thread of its own, if that pays."""
        if size >= _WORTH:
            self._maker = threading.Thread(
                target=self._make_ready, args=(size,), name="checkpoint-memory", daemon=True
            )
            self._maker.start()

    def copy(self, packed: Packed) -> Packed:
        """Return ``packed`` with copies of its tensors, which the next ``copy`` overwrites.

        Names of the very same tensor share one copy. When this returns the originals may change.
        """
        self._wait()
        own = {file: tensors.owners(part) for file, part in packed.parts.items()}
        unique = [(file, n) for file, owners in own.items() for n in dict.fromkeys(owners.values())]
        needed = sum(_padded(packed.parts[file][name].nbytes) for file, name in unique)
        memory, start = self._fitting(needed), 0
        copies: dict[tuple[str, str], Tensor] = {}
        large: list[tuple[Tensor, Tensor]] = []
        for key in unique:
            original = packed.parts[key[0]][key[1]].detach()
            end = start + original.nbytes
            copies[key] = memory[start:end].view(original.dtype).view(original.shape)
            if original.nbytes >= _LARGE and _is_plain(original):
                large.append((copies[key], original))
            else:  # to pinned memory this only tells the device what to do
                copies[key].copy_(original, non_blocking=True)
            start += _padded(original.nbytes)
        _copy_all(large)
        for device in set(_devices(packed)):
            torch.cuda.synchronize(device)
        parts = {file: {name: copies[file, owner] for name, owner in owners.items()}
                 for file, owners in own.items()}  # fmt: skip
        return attrs.evolve(packed, parts=parts)

    def release(self) -> None:
        """Give the memory back."""
        self._wait()
        self._drop()

    def _wait(self) -> None:
        if self._maker is not None:
            self._maker.join()
            self._maker = None

    def _drop(self) -> None:
        if self._registered and self._memory is not None:
            _runtime().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._registered = None, False

    def _fitting(self, needed: int) -> Tensor:
        if self._memory is None or self._memory.numel() < needed:
            self._drop()  # before there is another
            self._memory = self._made(needed)
        return self._memory

    def _make_ready(self, size: int) -> None:
        # If there is none, the save that needs it says so.
        with contextlib.suppress(RuntimeError, MemoryError):
            self._memory = self._made(size)

    def _made(self, size: int) -> Tensor:
        # Some room besides, for states that grow a little.
        memory = torch.empty(size + size // 256 + _ROOM, dtype=torch.uint8)
        pages = memory.numpy()
        for start in range(0, len(pages), _CHUNK):
            pages[start : start + _CHUNK : _PAGE] = 0
        if self._pinned:
            # The allocator of pinned tensors would round the size up to a power of two.
            failed = _runtime().cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE)
            self._registered = not int(failed)
        return memory


def _is_plain(tensor: Tensor) -> bool:
    plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return plain and tensor.device.type == "cpu"


def _copy_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy each second tensor into the first: several at a time, since one core alone does not
    reach the memory's speed. What torch does with its threads waits after every tensor."""
    left = iter([(copy.view(-1).view(torch.uint8).numpy(), it.view(-1).view(torch.uint8).numpy())
                 for copy, it in pairs])  # fmt: skip

    def work() -> None:
        for copy, original in left:  # of a list: what one thread takes no other gets
            copy[:] = original

    count = min(os.cpu_count() or 1, _COPIERS, len(pairs))
    others = [threading.Thread(target=work, daemon=True) for _ in range(count - 1)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _devices(packed: Packed) -> Iterator[torch.device]:
    for part in packed.parts.values():
        for tensor in part.values():
            if tensor.is_cuda:
                yield tensor.device
