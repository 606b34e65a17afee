"""Copy windows of tokens to the device as micro-batches, optionally in a background thread."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from fundamentallm import Batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from fundamentallm_text.sampling import Sampling, Starts
    from fundamentallm_text.token_cache import Tokens

T = TypeVar("T")

STARTS_AT_ONCE = 4096
SIGNED = {"uint16": np.int16, "uint32": np.int32}


class BatchPart(NamedTuple):
    """The part of a global micro-batch that this process reads."""

    first: int
    """Index of its first sample in the order of the data."""
    starts: Starts
    samples: int
    """Samples of the whole micro-batch, over all processes."""
    has_weight: bool = True
    """Whether the samples are of this process; else they are there since other processes have
    some, and may wait for this one in the passes of the micro-batch."""


@dataclass(frozen=True)
class BatchShape:
    """The samples of a micro-batch, and the range of them that this process reads."""

    size: int
    begin: int
    end: int


def batch_parts(sampling: Sampling, shape: BatchShape, first: int) -> Iterator[BatchPart]:
    """Yield the parts of the micro-batches from sample ``first`` on, without end."""
    count = max(1, STARTS_AT_ONCE // shape.size)
    while True:
        # Computing many starts at once costs little more than computing one.
        starts = sampling.starts(first, count * shape.size)
        for begin in range(0, count * shape.size, shape.size):
            ours = starts[begin + shape.begin : begin + shape.end]
            yield BatchPart(first + begin + shape.begin, ours, shape.size)
        first += count * shape.size


def load_batches(
    windows: Tokens, parts: Iterator[BatchPart], rows: int, device: str, depth: int
) -> Iterator[Batch]:
    """Yield the micro-batches of parts of up to ``rows`` windows, prepared ``depth`` ahead.

    ``windows`` is the view (starts, length + 1) of the tokens. Batches are (inputs, targets),
    int64, (rows, length), on ``device``. With ``depth`` 0 there is no background thread.
    """
    if device.startswith("cuda"):
        # One buffer is being filled and one copied, in addition to the prepared ones.
        buffers = [
            StagingBuffer(rows, windows.shape[1], windows.dtype, device) for _ in range(depth + 2)
        ]
        filled = fill_buffers(windows, parts, buffers)
        return send_buffers(prefetched(filled, depth) if depth else filled, device)
    batches = cpu_batches(windows, parts, device)
    return prefetched(batches, depth) if depth else batches


def cpu_batches(windows: Tokens, parts: Iterator[BatchPart], device: str) -> Iterator[Batch]:
    """Yield micro-batches that are converted to int64 on the CPU."""
    for part in parts:
        rows = windows[part.starts]
        inputs = torch.from_numpy(rows[:, :-1].astype(np.int64))
        targets = torch.from_numpy(rows[:, 1:].astype(np.int64))
        if device != "cpu":
            inputs, targets = inputs.to(device), targets.to(device)
        yield make_batch(inputs, targets, part)


def make_batch(inputs: Tensor, targets: Tensor, part: BatchPart) -> Batch:
    """Return a batch with the weight of this process's tokens and the counts of all processes."""
    count, length = inputs.shape
    weight, tokens = float(count * length * part.has_weight), part.samples * length
    data = (inputs, targets)
    # Every window is full, so the weight over all processes needs no message between them.
    return Batch(data, weight, part.samples, tokens, part.first, total=float(tokens))


class StagingBuffer:
    """A buffer in host memory, pinned for CUDA, that copies to the device read from."""

    def __init__(self, rows: int, width: int, dtype: np.dtype[Any], device: str) -> None:
        signed = np.dtype(SIGNED.get(dtype.name, dtype))
        empty = torch.from_numpy(np.empty((rows, width), dtype=signed))
        self.on_cuda = device.startswith("cuda")
        self.memory = empty.pin_memory() if self.on_cuda else empty
        # torch has few kernels for unsigned types, so it gets the same bytes as a signed type.
        self.array = self.memory.numpy().view(dtype)
        self.copied = torch.cuda.Event() if self.on_cuda else None  # type: ignore[no-untyped-call]
        self.rows = 0

    def fill(self, rows: Tokens) -> None:
        """Write tokens of their stored type, after the last copy out of the buffer has ended."""
        if self.copied is not None:
            self.copied.synchronize()
        self.rows = len(rows)
        self.array[: self.rows] = rows

    def send(self, device: str) -> Tensor:
        """Start a copy of the tokens to the device, and return them there as int64."""
        copied = self.memory[: self.rows].to(device, non_blocking=True)
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(device))
        wide = copied.to(torch.int64)
        bits = 8 * self.array.itemsize
        return wide & ((1 << bits) - 1) if self.array.dtype.kind == "u" else wide


def fill_buffers(
    windows: Tokens, parts: Iterator[BatchPart], buffers: list[StagingBuffer]
) -> Iterator[tuple[BatchPart, StagingBuffer]]:
    """Yield each part with the buffer that its tokens were written to; buffers are used in turn."""
    for number, part in enumerate(parts):
        buffer = buffers[number % len(buffers)]
        buffer.fill(windows[part.starts])
        yield part, buffer


def send_buffers(filled: Iterator[tuple[BatchPart, StagingBuffer]], device: str) -> Iterator[Batch]:
    """Yield the micro-batches of filled buffers, on the device."""
    for part, buffer in filled:
        wide = buffer.send(device)
        yield make_batch(wide[:, :-1].contiguous(), wide[:, 1:].contiguous(), part)


def prefetched(items: Iterator[T], depth: int) -> Iterator[T]:
    """Yield what ``items`` yields, read ahead by a thread that ends with this generator."""
    worker = Prefetcher(items, depth)
    try:
        yield from worker
    finally:
        worker.close()


class Prefetcher(Generic[T]):
    """An iterator that reads another one in a background thread, at most ``depth`` items ahead.

    An exception of that iterator is raised in place of its next item. ``close`` ends the thread.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._ready: Queue[tuple[T | None, BaseException | None]] = Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fundamentallm-text", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item, error = self._ready.get()
        if error is not None:
            self._ready.put((None, error))  # the next call raises it again
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread and wait for its end."""
        self._closed.set()
        while self._thread.is_alive():
            # Free a place in the queue, in case the thread waits for one.
            with suppress(Empty):
                self._ready.get_nowait()
            self._thread.join(0.001)

    def _work(self) -> None:
        try:
            for item in self._items:
                self._ready.put((item, None))
                if self._closed.is_set():
                    return
            self._ready.put((None, StopIteration()))
        except BaseException as error:  # noqa: BLE001 - raised in the consumer's thread
            self._ready.put((None, error))
