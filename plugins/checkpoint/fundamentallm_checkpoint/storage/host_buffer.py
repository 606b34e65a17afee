"""Host memory for the copy of a snapshot that is written while the training goes on."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs
import torch

from fundamentallm_checkpoint.storage import safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from fundamentallm_checkpoint.storage.snapshot import PackedSnapshot

    Form: TypeAlias = tuple[torch.dtype, torch.Size]
    Pair: TypeAlias = tuple[Tensor, Tensor]

_ALIGNMENT = 64
_PAGE = 2**12
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all devices, not only the current one

# Sizes in bytes.
_SPARE = 2**16
_CHUNK = 2**23
_MIN_PREPARED = 2**24  # a smaller block is allocated within a millisecond when it is needed
_MIN_THREADED = 2**20  # a smaller tensor is copied faster than a thread is woken
_PIECE = 2**22  # the largest tensor is cut, so that it does not occupy one thread to the end
_COPIERS = 4  # more threads than these do not raise the speed of memory


class HostBuffer:
    """One block of host memory, as large as what is saved, that all saves use in turn.

    Memory used for the first time costs several times a copy, since the system has to map every
    page. So the block is prepared in a thread of its own and kept. With ``pinned`` the device
    copies into it at full speed. Not to be used by two threads at once.
    """

    def __init__(self, *, pinned: bool = False) -> None:
        self._memory: Tensor | None = None
        self._forms: list[Form] = []
        self._copies: list[Tensor] = []
        self._threads = CopyThreads()
        self._pinned = pinned
        self._registered = False
        self._preparing: threading.Thread | None = None

    def reserve(self, size: int) -> None:
        """Start to prepare memory for ``size`` bytes in another thread, if it is large enough."""
        if size >= _MIN_PREPARED:
            self._preparing = threading.Thread(
                target=self._prepare, args=(size,), name="checkpoint-memory", daemon=True
            )
            self._preparing.start()

    def copy(self, packed: PackedSnapshot) -> PackedSnapshot:
        """Return ``packed`` with copies of its tensors; the next ``copy`` overwrites them.

        Names of the same tensor share one copy. The originals may change once this returns.
        """
        self._wait()
        owners = {file: safetensors.first_names(part) for file, part in packed.tensors.items()}
        keys = [(file, n) for file, names in owners.items() for n in dict.fromkeys(names.values())]
        originals = [packed.tensors[file][name].detach() for file, name in keys]
        pairs = list(zip(self._places(originals), originals, strict=True))
        large = [pair for pair in pairs if pair[0].nbytes >= _MIN_THREADED and _is_plain(pair[1])]
        by_threads = {id(copy) for copy, _ in large}
        with self._threads.copying(large):
            for copy, original in pairs:
                if id(copy) not in by_threads:
                    # From a device to pinned memory this only queues the copy.
                    copy.copy_(original, non_blocking=True)
        for device in {original.device for original in originals if original.is_cuda}:
            torch.cuda.synchronize(device)
        copies = dict(zip(keys, self._copies, strict=True))
        tensors = {
            file: {name: copies[file, owner] for name, owner in names.items()}
            for file, names in owners.items()
        }
        return attrs.evolve(packed, tensors=tensors)

    def release(self) -> None:
        """Free the memory and end the threads."""
        self._wait()
        self._free()
        self._threads.stop()

    def _wait(self) -> None:
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None

    def _free(self) -> None:
        if self._registered and self._memory is not None:
            _cuda_runtime().cudaHostUnregister(self._memory.data_ptr())
        self._memory, self._registered = None, False
        self._forms, self._copies = [], []

    def _places(self, originals: list[Tensor]) -> list[Tensor]:
        """Return the memory of each copy; the same as before if dtypes and shapes are the same."""
        forms = [(original.dtype, original.shape) for original in originals]
        if forms != self._forms:
            needed = sum(_padded(original.nbytes) for original in originals)
            if self._memory is None or self._memory.numel() < needed:
                self._free()  # first, so that there are never two blocks
                self._memory = self._allocate(needed)
            self._copies = list(_carve(self._memory, originals))
            self._forms = forms
        return self._copies

    def _prepare(self, size: int) -> None:
        # On failure the save that needs the memory tries again and reports it.
        with contextlib.suppress(RuntimeError, MemoryError):
            self._memory = self._allocate(size, touch=True)
        self._threads.start()

    def _allocate(self, size: int, *, touch: bool = False) -> Tensor:
        """Return new memory; ``touch`` writes to every page, so that the system maps it now."""
        # A little more, for state that grows.
        memory = torch.empty(size + size // 256 + _SPARE, dtype=torch.uint8)
        pages = memory.numpy()
        for start in range(0, len(pages) if touch else 0, _CHUNK):
            pages[start : start + _CHUNK : _PAGE] = 0
        if self._pinned:
            # Not torch's pinned allocator, which would round the size up to a power of two.
            failed = _cuda_runtime().cudaHostRegister(memory.data_ptr(), memory.numel(), _PORTABLE)
            self._registered = not int(failed)
        return memory


class CopyThreads:
    """Threads that copy host tensors together: one core does not reach the memory's bandwidth.

    Torch's own threads wait for each other after every tensor. These stay from save to save,
    because starting a thread may take long on a busy machine.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """Start the threads; without them the calling thread copies everything."""
        count = min(os.cpu_count() or 1, _COPIERS) - 1
        if self._pool is None and count:
            self._pool = ThreadPoolExecutor(count, "checkpoint-copy")
            self._submit(count, int)  # a pool starts its threads with its first tasks

    @contextlib.contextmanager
    def copying(self, pairs: list[Pair]) -> Iterator[None]:
        """Copy each second tensor into the first while the block runs; both have one form.

        The calling thread joins in at the end of the block. Raises the first error of a copy.
        """
        pieces = [(*pair, start) for pair in pairs for start in range(0, pair[0].nbytes, _PIECE)]
        left, done = iter(pieces), SimpleQueue[BaseException | None]()

        def work() -> None:
            for *pair, start in left:  # the threads share one iterator: each piece goes to one
                error = None
                try:
                    copy, original = (_bytes(tensor)[start : start + _PIECE] for tensor in pair)
                    copy[:] = original
                except BaseException as caught:  # noqa: BLE001 - raised by the waiting thread
                    error = caught
                done.put(error)

        if len(pieces) > 1:
            self.start()
            self._submit(min(len(pieces), _COPIERS) - 1, work)
        try:
            yield
        finally:
            work()
            # Counts pieces, not threads: a thread that starts only now finds none left.
            errors = [done.get() for _ in pieces]
        for error in errors:
            if error is not None:
                raise error

    def stop(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None

    def _submit(self, count: int, work: Callable[[], object]) -> None:
        if self._pool is not None:
            with contextlib.suppress(RuntimeError):  # the system has no thread to spare
                for _ in range(count):
                    self._pool.submit(work)


def _carve(memory: Tensor, originals: list[Tensor]) -> Iterator[Tensor]:
    start = 0
    for original in originals:
        taken = memory[start : start + original.nbytes]
        yield taken.view(original.dtype).view(original.shape)
        start += _padded(original.nbytes)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether the tensor's bytes in memory are its content."""
    plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return plain and tensor.device.type == "cpu"


def _bytes(tensor: Tensor) -> NDArray[Any]:
    return tensor.view(-1).view(torch.uint8).numpy()


def _cuda_runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
