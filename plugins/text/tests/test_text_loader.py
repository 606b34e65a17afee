"""From tokens to batches: the same ones by every way there is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count, islice

import gpu
import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from fundamentallm import Batch, DataError
from fundamentallm_text.loader import (
    BatchShape,
    StagingBuffer,
    batch_parts,
    fill_buffers,
    load_batches,
    prefetched,
    send_buffers,
)
from fundamentallm_text.sampling import RandomWindows

DTYPES = ["uint8", "uint16", "uint32", "int16", "int32", "int64"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
LENGTH, ROWS = 5, 3
ORDER = RandomWindows(200, LENGTH, 11)


def _tokens(dtype: str) -> np.ndarray:
    """Ids up to the largest of a type: what signed numbers of the same size cannot hold."""
    top = min(int(np.iinfo(dtype).max), 2**32 - 1)
    return np.linspace(0, top, 200).astype(dtype)


def _plain(batch: Batch) -> tuple[list[list[int]], list[list[int]], tuple[float, int, int, int]]:
    inputs, targets = batch.data
    counts = (batch.weight, batch.samples, batch.tokens, batch.first)
    return inputs.tolist(), targets.tolist(), counts


def _expected(dtype: str, batches: int, first: int = 0) -> list[object]:
    tokens = _tokens(dtype)
    found: list[object] = []
    for begin in range(first, first + batches * ROWS, ROWS):
        starts = ORDER.starts(begin, ROWS)
        rows = [tokens[s : s + LENGTH + 1].tolist() for s in starts]
        counts = (float(ROWS * LENGTH), ROWS, ROWS * LENGTH, begin)
        found.append(([row[:-1] for row in rows], [row[1:] for row in rows], counts))
    return found


def _feed(dtype: str, device: str, depth: int, first: int = 0) -> Iterator[Batch]:
    windows = sliding_window_view(_tokens(dtype), LENGTH + 1)
    return load_batches(
        windows, batch_parts(ORDER, BatchShape(ROWS, 0, ROWS), first), ROWS, device, depth
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_are_the_windows_of_the_sampling(dtype: str, depth: int, device: str) -> None:
    stream = _feed(dtype, device, depth, first=7)
    found = list(islice(stream, 20))
    assert [_plain(batch) for batch in found] == _expected(dtype, 20, first=7)
    for batch in found:
        assert [t.dtype for t in batch.data] == [torch.int64, torch.int64]
        assert all(t.is_contiguous() and t.device.type == device for t in batch.data)
    assert len({t.data_ptr() for batch in found for t in batch.data}) == 40
    if depth:
        stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_pass_through_staging_buffers_unchanged(dtype: str, depth: int, device: str) -> None:
    """The way of a GPU, which the CPU can walk too: as stored, in turn, widened on arrival."""
    windows = sliding_window_view(_tokens(dtype), LENGTH + 1)
    slots = [StagingBuffer(ROWS, LENGTH + 1, windows.dtype, device) for _ in range(depth + 2)]
    assert all(slot.memory.element_size() == windows.dtype.itemsize for slot in slots)
    assert all(slot.memory.dtype not in (torch.uint16, torch.uint32) for slot in slots)
    filled = fill_buffers(windows, batch_parts(ORDER, BatchShape(ROWS, 0, ROWS), 0), slots)
    stream = send_buffers(prefetched(filled, depth) if depth else filled, device)
    found = list(islice(stream, 30))
    assert [_plain(batch) for batch in found] == _expected(dtype, 30)
    del stream, filled


class Copies:
    """Stands for a stream that copies late, and for its event: a copy ends when it is waited for."""

    def __init__(self) -> None:
        self.pending = 0
        self.waits = 0

    def record(self, _: object) -> None:
        self.pending = 1

    def synchronize(self) -> None:
        self.waits += self.pending
        self.pending = 0


class Watched:
    """The array of a buffer, which must not be written to while a copy out of it is pending."""

    def __init__(self, array: np.ndarray, copies: Copies) -> None:
        self.array, self.copies = array, copies
        self.dtype, self.itemsize = array.dtype, array.itemsize

    def __setitem__(self, where: slice, rows: np.ndarray) -> None:
        assert not self.copies.pending, "written before its copy has ended"
        self.array[where] = rows


@pytest.mark.parametrize("depth", [0, 2])
def test_a_buffer_is_written_again_only_after_the_copy_out_of_it(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    windows = sliding_window_view(_tokens("uint16"), LENGTH + 1)
    buffers = [StagingBuffer(ROWS, LENGTH + 1, windows.dtype, "cpu") for _ in range(depth + 2)]
    copies = [Copies() for _ in buffers]
    for buffer, copy in zip(buffers, copies, strict=True):
        buffer.copied = copy  # type: ignore[assignment]
        buffer.array = Watched(buffer.array, copy)  # type: ignore[assignment]
    filled = fill_buffers(windows, batch_parts(ORDER, BatchShape(ROWS, 0, ROWS), 0), buffers)
    stream = send_buffers(prefetched(filled, depth) if depth else filled, "cpu")
    found = list(islice(stream, 30))
    assert [_plain(batch) for batch in found] == _expected("uint16", 30)
    assert all(copy.waits >= 30 // len(buffers) - 1 for copy in copies)
    del stream, filled


@pytest.mark.cuda(seconds=10)
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("dtype", ["uint16", "int64"])
def test_batches_are_right_on_a_gpu_that_copies_late(dtype: str, depth: int) -> None:
    """Its counterpart on the CPU is the test above."""
    gpu.prepare_to_occupy("cuda")
    gpu.occupy("cuda", 0.5)  # every copy waits behind this
    stream = _feed(dtype, "cuda", depth)
    found = list(islice(stream, 30))
    assert [_plain(batch) for batch in found] == _expected(dtype, 30)
    if depth:
        stream.close()  # type: ignore[attr-defined]


def test_batch_parts_continue_at_the_start_of_a_batch_of_any_size() -> None:
    whole = [
        part.starts.tolist() for part in islice(batch_parts(ORDER, BatchShape(1, 0, 1), 0), 10_000)
    ]
    flat = [start for starts in whole for start in starts]
    later = next(batch_parts(ORDER, BatchShape(8, 2, 5), 9000))
    assert later.starts.tolist() == flat[9002:9005]
    assert (later.first, later.samples) == (9002, 8)


def _failing(after: int) -> Iterator[int]:
    yield from range(after)
    raise DataError("the disk is gone")


def test_an_error_in_the_thread_is_raised_in_place_of_its_item() -> None:
    stream = prefetched(_failing(5), 2)
    assert list(islice(stream, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="the disk is gone"):
        next(stream)
    assert list(stream) == []


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("taken", [0, 1, 10])
def test_no_thread_is_left_running(depth: int, taken: int) -> None:
    before = threading.active_count()
    stream = prefetched(count(), depth)
    assert list(islice(stream, taken)) == list(range(taken))
    stream.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_a_garbage_collected_stream_ends_its_thread() -> None:
    before = threading.active_count()
    stream = prefetched(count(), 2)
    next(stream)
    assert threading.active_count() == before + 1
    del stream
    assert threading.active_count() == before


def test_an_iterator_that_ends_ends_the_stream() -> None:
    assert list(prefetched(iter(range(7)), 2)) == list(range(7))


def test_the_thread_never_reads_further_ahead_than_depth() -> None:
    made: list[int] = []
    reached = threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if number == 3:
                reached.set()
            yield number

    stream = prefetched(items(), 2)
    assert next(stream) == 0
    assert reached.wait(10)  # 0 was taken, 1 and 2 wait, 3 waits for room
    assert not threading.Event().wait(0.05)
    assert made == [0, 1, 2, 3]
    stream.close()  # type: ignore[attr-defined]
