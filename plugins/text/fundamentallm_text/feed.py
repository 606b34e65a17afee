"""From places in the tokens to micro-batches on the device, ahead of time if asked for."""

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

    from fundamentallm_text.order import Order, Starts
    from fundamentallm_text.store import Tokens

T = TypeVar("T")

PLANNED = 4096
SIGNED = {"uint16": np.int16, "uint32": np.int32}


class Part(NamedTuple):
    """This process's part of a global micro-batch."""

    first: int
    """Index of its first sample in the order of the data."""
    starts: Starts
    samples: int
    """Samples of the micro-batch, over all processes."""


@dataclass(frozen=True)
class Cut:
    """How an order is cut into micro-batches: the samples of one, and which of them are ours."""

    size: int
    begin: int
    end: int


def plan(order: Order, cut: Cut, first: int) -> Iterator[Part]:
    """Yield the micro-batches from sample ``first`` on, without end."""
    count = max(1, PLANNED // cut.size)
    while True:
        # Working out many places at a time costs little more than working out one.
        starts = order.starts(first, count * cut.size)
        for begin in range(0, count * cut.size, cut.size):
            ours = starts[begin + cut.begin : begin + cut.end]
            yield Part(first + begin + cut.begin, ours, cut.size)
        first += count * cut.size


def feed(
    windows: Tokens, parts: Iterator[Part], rows: int, device: str, depth: int
) -> Iterator[Batch]:
    """Yield the micro-batches of parts of up to ``rows`` windows, prepared ``depth`` ahead.

    ``windows`` is the view (places, length + 1) of the tokens. Batches are (inputs, targets),
    int64, (rows, length), on ``device``. With ``depth`` 0 there is no thread.
    """
    if device.startswith("cuda"):
        # One slot is filled and one is being sent, besides those that wait.
        slots = [Slot(rows, windows.shape[1], windows.dtype, device) for _ in range(depth + 2)]
        filled = staged(windows, parts, slots)
        return sent(ahead(filled, depth) if depth else filled, device)
    batches = host_batches(windows, parts, device)
    return ahead(batches, depth) if depth else batches


def host_batches(windows: Tokens, parts: Iterator[Part], device: str) -> Iterator[Batch]:
    """Yield micro-batches that the host widens."""
    for part in parts:
        rows = windows[part.starts]
        inputs = torch.from_numpy(rows[:, :-1].astype(np.int64))
        targets = torch.from_numpy(rows[:, 1:].astype(np.int64))
        if device != "cpu":
            inputs, targets = inputs.to(device), targets.to(device)
        yield batch_of(inputs, targets, part)


def batch_of(inputs: Tensor, targets: Tensor, part: Part) -> Batch:
    """Make a batch: it weighs what it holds, and counts what all processes hold together."""
    count, length = inputs.shape
    return Batch(
        (inputs, targets), float(count * length), part.samples, part.samples * length, part.first
    )


class Slot:
    """A buffer on the host that a copy to the device reads from."""

    def __init__(self, rows: int, width: int, dtype: np.dtype[Any], device: str) -> None:
        signed = np.dtype(SIGNED.get(dtype.name, dtype))
        empty = torch.from_numpy(np.empty((rows, width), dtype=signed))
        self.on_cuda = device.startswith("cuda")
        self.memory = empty.pin_memory() if self.on_cuda else empty
        # torch has few kernels for unsigned numbers: it sees the same bytes as signed ones.
        self.array = self.memory.numpy().view(dtype)
        self.copied = torch.cuda.Event() if self.on_cuda else None  # type: ignore[no-untyped-call]
        self.rows = 0

    def fill(self, rows: Tokens) -> None:
        """Write new tokens, as they are stored, once the last copy out of the buffer is over."""
        if self.copied is not None:
            self.copied.synchronize()
        self.rows = len(rows)
        self.array[: self.rows] = rows

    def send(self, device: str) -> Tensor:
        """Begin to copy the tokens to the device, and return them there, widened to int64."""
        there = self.memory[: self.rows].to(device, non_blocking=True)
        if self.copied is not None:
            self.copied.record(torch.cuda.current_stream(device))
        wide = there.to(torch.int64)
        bits = 8 * self.array.itemsize
        return wide & ((1 << bits) - 1) if self.array.dtype.kind == "u" else wide


def staged(
    windows: Tokens, parts: Iterator[Part], slots: list[Slot]
) -> Iterator[tuple[Part, Slot]]:
    """Yield each part with the slot that its tokens were written to, taking the slots in turn."""
    for turn, part in enumerate(parts):
        slot = slots[turn % len(slots)]
        slot.fill(windows[part.starts])
        yield part, slot


def sent(filled: Iterator[tuple[Part, Slot]], device: str) -> Iterator[Batch]:
    """Yield the micro-batches of filled slots, on the device."""
    for part, slot in filled:
        wide = slot.send(device)
        yield batch_of(wide[:, :-1].contiguous(), wide[:, 1:].contiguous(), part)


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """Yield what ``items`` yields, taken by a thread that ends when this generator does."""
    worker = Ahead(items, depth)
    try:
        yield from worker
    finally:
        worker.close()


class Ahead(Generic[T]):
    """Takes the items of an iterator in a thread of its own, at most ``depth`` of them ahead.

    An exception of the iterator is raised where its item would have come. ``close`` ends the
    thread and waits for it.
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
            self._ready.put((None, error))  # asked again, it answers the same
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """End the thread, whatever it is doing, and wait until it is gone."""
        self._closed.set()
        while self._thread.is_alive():
            # A thread that waits for room in the queue goes on, and sees that it is to end.
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
        except BaseException as error:  # noqa: BLE001 - raised in the thread that asks
            self._ready.put((None, error))
