"""What a step that saves waits for: one copy into memory that is there, and nothing else."""

from __future__ import annotations

import hashlib
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fundamentallm import Period, field, hookimpl, plugin
from fundamentallm_checkpoint import Checkpoint, resume
from fundamentallm_checkpoint.resume import LoadRequest
from fundamentallm_checkpoint.storage import durable_files, host_buffer, nonfinite
from fundamentallm_checkpoint.storage import snapshot as snapshots
from fundamentallm_checkpoint.storage.host_buffer import CopyThreads, HostBuffer
from fundamentallm_checkpoint.storage.retention import Rules

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fundamentallm import Run
    from fundamentallm.testing import TinyRun

WIDTH = 600  # more than a MB a layer: copied by several threads
SMALL = 2**18  # lists, dicts, the state of the random numbers


@plugin
class Wide:
    """Two layers of which most is only there to be saved."""

    @hookimpl
    def build_model(self) -> torch.nn.Module:
        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = torch.nn.Linear(8, 1)
                self.wide = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(2))

            def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
                loss = torch.nn.functional.mse_loss(self.first(inputs), targets)
                return loss + 0.0 * sum(layer.weight.sum() for layer in self.wide)

        return Model()


class NewMemory(TorchDispatchMode):
    """Counts the bytes of tensors that lie in no memory of an operation's arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        given = {place(tensor) for tensor in tensors((args, kwargs or {}))}
        self.size += sum(new.nbytes for new in tensors(answer) if place(new) not in given)
        return answer


def settle() -> None:
    """Wait for the save that is under way."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, dict | list | tuple):
        parts = tree.values() if isinstance(tree, dict) else tree
        return [tensor for part in parts for tensor in tensors(part)]
    return [tree] if isinstance(tree, torch.Tensor) else []


def place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@plugin
class Weighs:
    """Notes the new memory that a safe point takes, in tensors and in all else; the first apart."""

    tensors: list[int] = field(init=False, factory=list)
    peaks: list[int] = field(init=False, factory=list)
    weighed: Any = field(init=False, default=None)

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        # At every step: the core replaces the caller of a hook after its first call.
        saves = run.hook.on_safe_point
        if saves is self.weighed:
            return

        def weighed(*, run: Run) -> object:
            if run.progress.step == 1 or run.ending:
                saves(run=run)
            else:
                tracemalloc.start()
                with NewMemory() as new:
                    saves(run=run)
                self.peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()
                self.tensors.append(new.size)
            return settle()

        self.weighed = weighed
        run.hook.on_safe_point = weighed  # type: ignore[method-assign]


def test_from_the_second_save_on_a_step_allocates_no_memory_for_its_copy(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable_files, "CHUNK", 2**14)
    monkeypatch.setattr(
        nonfinite, "_CHUNK", 2**12
    )  # of the thread that writes, which is traced too
    weighs = Weighs()
    tiny_run(Wide(), Checkpoint(every=Period(1)), weighs, length=4, log_every=99)
    assert len(weighs.tensors) == 2
    assert max(weighs.tensors) < SMALL, "of 9 MB that are saved"
    assert max(weighs.peaks) < SMALL


class Begun:
    """Notes which thread begins what."""

    def __init__(self) -> None:
        self.by: dict[str, set[str]] = {}

    def note(self, what: str) -> None:
        self.by.setdefault(what, set()).add(threading.current_thread().name)

    def noting(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call``, noted."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.note(what)
            return call(*args, **kwargs)

        return noted


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Begun:
    made = Begun()

    class Noted(durable_files.System):
        def __getattribute__(self, name: str) -> Any:
            made.note(name)
            return object.__getattribute__(self, name)

    class Hash:
        def __init__(self) -> None:
            real = hashlib.sha256()
            self.update, self.hexdigest = made.noting("hash", real.update), real.hexdigest

    monkeypatch.setattr(durable_files, "system", Noted())
    monkeypatch.setattr(durable_files, "hashlib", SimpleNamespace(sha256=Hash))
    monkeypatch.setattr(
        nonfinite, "holds_nonfinite", made.noting("search", nonfinite.holds_nonfinite)
    )
    return made


@plugin
class Looks:
    """Collect which threads did what while asynchronous saves were written."""

    begun: Any = None
    seen: dict[str, set[str]] = field(init=False, factory=dict)

    @hookimpl
    def on_step_end(self) -> None:
        self.begun.by.clear()  # what was made ready before the first step

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        settle()
        for what, names in () if run.ending else self.begun.by.items():
            self.seen.setdefault(what, set()).update(names)


def test_the_step_that_saves_does_not_hash_search_write_or_sync(
    tiny_run: TinyRun, begun: Begun
) -> None:
    looks = Looks()
    looks.begun = begun
    tiny_run(Checkpoint(every=Period(1)), looks, length=4)
    assert {"hash", "search", "write", "fsync", "rename"} <= looks.seen.keys()
    assert {what: names for what, names in looks.seen.items() if names != {"checkpoint"}} == {}


def packed(**model: torch.Tensor) -> snapshots.PackedSnapshot:
    return snapshots.pack({"model": model, "optimizer": {}})


def weights(arena: HostBuffer, **model: torch.Tensor) -> dict[str, torch.Tensor]:
    return arena.copy(packed(**model)).tensors["model.safetensors"]


def test_the_memory_is_divided_again_when_dtypes_shapes_or_names_change() -> None:
    arena = HostBuffer()
    wide, other = torch.randn(1024, 300), torch.randn(300, 1024)
    first = weights(arena, a=wide, b=other)
    again = weights(arena, a=other.clone().view(1024, 300), b=other)
    assert [first[name].data_ptr() for name in "ab"] == [again[name].data_ptr() for name in "ab"]
    for model in (
        {"a": wide.half(), "b": other},
        {"a": wide[:7], "b": other},
        {"a": wide, "b": wide},
        {"a": wide, "b": wide.clone()},
        {"a": wide, "c": other},
        {"a": wide.t(), "b": other.t()},
        {"a": wide.view(-1), "b": other, "c": torch.randn(4096, 500)},
        {"b": other},
    ):
        weights(arena, a=wide, b=other)
        copies = weights(arena, **model)
        assert copies.keys() == model.keys()
        assert [name for name in model if not copies[name].equal(model[name])] == []
        shared = len({tensor.data_ptr() for tensor in model.values()})
        assert len({tensor.data_ptr() for tensor in copies.values()}) == shared
    arena.release()


def test_one_tensor_that_is_larger_than_all_pool_is_copied_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host_buffer, "_PIECE", 2**16 + 1)
    monkeypatch.setattr(host_buffer.os, "cpu_count", lambda: 4)
    made = torch.Generator().manual_seed(1)
    large = torch.randn(3, 500_000, generator=made).to(torch.bfloat16)
    arena = HostBuffer()
    for _ in range(3):
        large.add_(1)
        assert weights(arena, a=large)["a"].equal(large)
    arena.release()


def test_without_another_thread_the_training_thread_copies_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    large = {name: torch.randn(600, 600) for name in "abcd"}
    copies = weights(HostBuffer(), **large)
    assert [name for name in large if not copies[name].equal(large[name])] == []


def test_a_thread_that_starts_late_is_not_waited_for() -> None:
    gate, began = threading.Event(), threading.Event()
    threads = CopyThreads()
    threads._pool = ThreadPoolExecutor(1)
    threads._pool.submit(lambda: (began.set(), gate.wait(30)))  # type: ignore[func-returns-value]
    assert began.wait(30)
    originals = [torch.randn(600, 600) for _ in range(5)]
    copies = [torch.empty(600, 600) for _ in range(5)]
    with threads.copying(list(zip(copies, originals, strict=True))):
        pass
    assert not gate.is_set()
    gate.set()
    assert all(copy.equal(original) for copy, original in zip(copies, originals, strict=True))
    threads.stop()


def test_an_error_in_any_copying_thread_is_raised() -> None:
    threads = CopyThreads()
    pairs = [(torch.empty(600, 600), torch.randn(600, 600)) for _ in range(9)]
    pairs[5] = (torch.empty(600, 600), torch.randn(600, 601))
    with pytest.raises(ValueError, match="broadcast"), threads.copying(pairs):
        pass
    threads.stop()


def test_if_the_block_fails_no_thread_copies_afterwards() -> None:
    threads = CopyThreads()
    originals = [torch.randn(600, 600) for _ in range(9)]
    copies = [torch.empty(600, 600) for _ in range(9)]
    with pytest.raises(KeyError), threads.copying(list(zip(copies, originals, strict=True))):
        raise KeyError
    assert all(copy.equal(original) for copy, original in zip(copies, originals, strict=True))
    threads.stop()


def test_with_no_memory_for_a_copy_the_step_waits_for_its_save(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: HostBuffer, size: int, *, touch: bool = False) -> torch.Tensor:
        raise RuntimeError(f"you tried to allocate {size} bytes")

    monkeypatch.setattr(HostBuffer, "_allocate", refuse)
    run = tiny_run(Wide(), Checkpoint(every=Period(2), keep_last=9), length=5)
    assert names(run.folder / "checkpoints") == [f"step-0000000{step}" for step in (2, 4, 5)]
    assert (
        resume.load([run.folder / "checkpoints"], LoadRequest(rules=Rules(keep_last=1))) is not None
    )
    assert caplog.text.count("no memory for a copy") == 2


def names(home: Path) -> list[str]:
    return sorted(path.name for path in home.glob("step-*"))
