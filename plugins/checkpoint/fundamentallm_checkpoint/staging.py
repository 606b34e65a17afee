"""Host memory in which a snapshot waits to be written while the run goes on."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import torch

from fundamentallm_checkpoint import tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from fundamentallm_checkpoint.contents import Packed

    Form: TypeAlias = tuple[torch.dtype, torch.Size]
    Pair: TypeAlias = tuple[Tensor, Tensor]

_ALIGNMENT = 64
_PAGE = 2**12
_ROOM = 2**16
_PORTABLE = 1  # cudaHostRegisterPortable: for all devices, whichever is the current one
_CHUNK = 2**23
_PIECE = 2**22  # so that no thread is left alone with one tensor that is larger than all others
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
        self._forms: list[Form] = []
        self._copies: list[Tensor] = []
        self._crew = Crew()
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
        keys = [(file, n) for file, owners in own.items() for n in dict.fromkeys(owners.values())]
        originals = [packed.parts[file][name].detach() for file, name in keys]
        pairs = list(zip(self._fitting(originals), originals, strict=True))
        large = [pair for pair in pairs if pair[0].nbytes >= _LARGE and _is_plain(pair[1])]
        aside = {id(copy) for copy, _ in large}
        with self._crew.copying(large):
            for copy, original in pairs:
                if id(copy) not in aside:  # to pinned memory this only tells the device what to do
                    copy.copy_(original, non_blocking=True)
        for device in {original.device for original in originals if original.is_cuda}:
            torch.cuda.synchronize(device)
        copies = dict(zip(keys, self._copies, strict=True))
        parts = {
            file: {name: copies[file, owner] for name, owner in owners.items()}
            for file, owners in own.items()
        }
        return attrs.evolve(packed, parts=parts)

    def release(self) -> None:
        """Give the memory back, and end the threads that copy."""
        self._wait()
        self._drop()
        self._crew.leave()

    def _wait(self) -> None:
        if self._maker is not None:
            self._maker.join()
            self._maker = None

    def _drop(self) -> None:
        if self._registered and self._memory is not None:
            _runtime().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._registered = None, False
        self._forms, self._copies = [], []

    def _fitting(self, originals: list[Tensor]) -> list[Tensor]:
        """Return where the copies go: where they went before, if all have the same forms."""
        forms = [(original.dtype, original.shape) for original in originals]
        if forms != self._forms:
            needed = sum(_padded(original.nbytes) for original in originals)
            if self._memory is None or self._memory.numel() < needed:
                self._drop()  # before there is another
                self._memory = self._made(needed)
            self._copies = list(_carved(self._memory, originals))
            self._forms = forms
        return self._copies

    def _make_ready(self, size: int) -> None:
        # If there is none, the save that needs it says so.
        with contextlib.suppress(RuntimeError, MemoryError):
            self._memory = self._made(size, found=True)
        self._crew.come()

    def _made(self, size: int, *, found: bool = False) -> Tensor:
        """Return new memory; with ``found``, the system has found every page of it."""
        # Some room besides, for states that grow a little.
        memory = torch.empty(size + size // 256 + _ROOM, dtype=torch.uint8)
        pages = memory.numpy()
        for start in range(0, len(pages) if found else 0, _CHUNK):
            pages[start : start + _CHUNK : _PAGE] = 0
        if self._pinned:
            # The allocator of pinned tensors would round the size up to a power of two.
            failed = _runtime().cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE)
            self._registered = not int(failed)
        return memory


class Crew:
    """Threads that copy in the host's memory, several tensors at a time: one core alone does not
    reach the memory's speed. What torch does with its threads waits after every tensor.

    They stay from save to save, for a thread may wait long for its beginning where cores are busy.
    """

    def __init__(self) -> None:
        self._others: ThreadPoolExecutor | None = None

    def come(self) -> None:
        """Have the threads begin; without them all is copied by the one that asks for it."""
        count = min(os.cpu_count() or 1, _COPIERS) - 1
        if self._others is None and count:
            self._others = ThreadPoolExecutor(count, "checkpoint-copy")
            self._ask(count, int)  # nothing to do as yet

    @contextlib.contextmanager
    def copying(self, pairs: list[Pair]) -> Iterator[None]:
        """Copy each second tensor into the first, which are of the same form: the others begin at
        once, and who asks for it joins them at the end."""
        pieces = [(*pair, start) for pair in pairs for start in range(0, pair[0].nbytes, _PIECE)]
        left, done = iter(pieces), SimpleQueue[BaseException | None]()

        def work() -> None:
            for *pair, start in left:  # of a list: what one thread takes no other gets
                error = None
                try:
                    copy, original = (_bytes(tensor)[start : start + _PIECE] for tensor in pair)
                    copy[:] = original
                except BaseException as caught:  # noqa: BLE001 - raised where it is waited for
                    error = caught
                done.put(error)

        if len(pieces) > 1:
            self.come()
            self._ask(min(len(pieces), _COPIERS) - 1, work)
        try:
            yield
        finally:
            work()
            # Whoever has not begun by now finds nothing left, and is not waited for.
            errors = [done.get() for _ in pieces]
        for error in errors:
            if error is not None:
                raise error

    def _ask(self, count: int, work: Callable[[], object]) -> None:
        if self._others is not None:
            with contextlib.suppress(RuntimeError):  # the system has no thread to spare
                for _ in range(count):
                    self._others.submit(work)

    def leave(self) -> None:
        """End the threads."""
        if self._others is not None:
            self._others.shutdown(wait=False)
            self._others = None


def _carved(memory: Tensor, originals: list[Tensor]) -> Iterator[Tensor]:
    start = 0
    for original in originals:
        taken = memory[start : start + original.nbytes]
        yield taken.view(original.dtype).view(original.shape)
        start += _padded(original.nbytes)


def _is_plain(tensor: Tensor) -> bool:
    plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return plain and tensor.device.type == "cpu"


def _bytes(tensor: Tensor) -> NDArray[Any]:
    return tensor.view(-1).view(torch.uint8).numpy()


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
