"""Tiny runs in several processes on this machine, as a launcher would start them."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import pytest

from fundamentallm import FundamentalError, find_plugins
from fundamentallm.host import get_state
from fundamentallm.testing.tiny import compose_tiny

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from torch import Tensor

T = TypeVar("T")
PATIENCE = 120.0  # seconds until processes that have not ended count as hanging
context = multiprocessing.get_context("fork")


@attrs.frozen
class Trained:
    """What a process of a tiny run ended with."""

    outcome: str
    step: int
    history: list[dict[str, float]]
    weights: dict[str, Tensor]
    """Whole tensors on the CPU."""
    states: dict[str, Any]
    """The state of each plugin, by its name."""
    folder: Path
    """The run folder."""
    error: FundamentalError | None = None


def in_processes(count: int, work: Callable[[int], T], *, patience: float = PATIENCE) -> list[T]:
    """Call ``work(rank)`` in ``count`` forked processes and return the results in order of rank.

    Each has the environment variables with which torchrun starts processes. Raises ``TimeoutError``
    if they have not all ended after ``patience`` seconds, and an error with the traceback if one of
    them raises.
    """
    import torch

    # torch imports its compiler with the first optimizer: once here, and not in every process.
    torch.optim.SGD([torch.zeros(1)])
    port, started = free_port(), []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        place = Place(rank, count, port)
        process = context.Process(target=_work, args=(work, place, theirs), daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    until, answers = time.monotonic() + patience, []
    try:
        for rank, (_, pipe) in enumerate(started):
            if not pipe.poll(max(0.0, until - time.monotonic())):
                raise TimeoutError(f"process {rank} of {count} has not ended in {patience:g} s")
            answers.append(_received(rank, pipe))
        return answers
    finally:
        for process, _ in started:
            process.kill()
            process.join()


@attrs.frozen
class Place:
    """The place of a process among those of a group."""

    rank: int
    count: int
    port: int

    def variables(self) -> dict[str, str]:
        """Return what torchrun sets in the environment of a process."""
        rank, count = str(self.rank), str(self.count)
        return {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
        }


def free_port() -> int:
    """Return a port of this machine that nothing uses now."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port: int = chosen.getsockname()[1]
        return port


def _work(work: Callable[[int], T], place: Place, pipe: Connection) -> None:
    import torch

    os.environ.update(place.variables())
    # The threads of the process that this one was forked from do not exist here.
    torch.set_num_threads(1)
    buffer = io.BytesIO()
    try:
        torch.save((work(place.rank), None), buffer)
    except BaseException:  # noqa: BLE001 - raised where the processes were started
        buffer = io.BytesIO()
        torch.save((None, traceback.format_exc()), buffer)
    pipe.send_bytes(buffer.getvalue())


def _received(rank: int, pipe: Connection) -> Any:
    import torch

    try:
        # From our own process: nothing in it is to be distrusted.
        answer, failure = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
    except EOFError:
        raise RuntimeError(f"process {rank} has died") from None
    if failure is not None:
        raise RuntimeError(f"process {rank} failed:\n{failure}")
    return answer


TwoProcesses = Callable[..., list[Trained]]


@pytest.fixture
def two_processes(tmp_path: Path) -> TwoProcesses:
    """Train a tiny real run in two processes: ``two_processes(GradClip(max_norm=1.0), length=8)``.

    The arguments are those of ``tiny_run``. ``ddp`` is listed unless ``kind`` names another plugin
    that joins processes; ``processes`` is their number. Returns what each of them ended with.
    """

    def start(
        *plugins: str | object,
        settings: Mapping[str, Any] | None = None,
        run_dir: Path | None = None,
        processes: int = 2,
        kind: str = "ddp",
        patience: float = PATIENCE,
        **run: Any,
    ) -> list[Trained]:
        if kind not in find_plugins():
            pytest.skip(f"{kind} is not installed: pip install fundamentallm-distributed")
        tables = {kind: {"timeout": 20}, **(settings or {})}

        def work(_: int) -> Trained:
            composed = compose_tiny(*plugins, kind, settings=tables, **run)
            return _trained(composed, run_dir or tmp_path / "run")

        return _with_whole_tensors(in_processes(processes, work, patience=patience))

    return start


def _trained(composed: Any, folder: Path) -> Trained:
    from fundamentallm import train

    try:
        run = train(composed, run_dir=folder)
    except FundamentalError as error:
        return Trained("failed", 0, [], {}, {}, folder, error)
    states = {name: get_state(instance) for name, instance in run.plugins.items()}
    ended = run.outcome, run.progress.step, run.history
    return Trained(*ended, _copied(run.model.state_dict()), _copied(states), run.folder)


@attrs.frozen
class Part:
    """The part of a distributed tensor that a process holds.

    ``dims`` are the dimensions along which it was divided, the last division first, and ``indices``
    its places in them.
    """

    values: Tensor
    dims: tuple[int, ...]
    indices: tuple[int, ...]


def _copied(tree: Any) -> Any:
    """Return a tree with copies of its tensors on the CPU, and a ``Part`` of a distributed one."""
    if isinstance(tree, Mapping):
        return {key: _copied(value) for key, value in tree.items()}
    if not hasattr(tree, "detach"):
        return tree
    if not hasattr(tree, "to_local"):
        return tree.detach().cpu().clone()
    # Joined where the processes were started: they have left the group that exchanges tensors.
    values, places = tree.to_local().detach().cpu().clone(), list(enumerate(tree.placements))
    divided = [axis for axis, place in places if not place.is_replicate()]
    if not divided:
        return values
    here = tree.device_mesh.get_coordinate()
    dims = tuple(tree.placements[axis].dim for axis in divided)
    return Part(values, dims, tuple(here[axis] for axis in divided))


def _with_whole_tensors(trained: list[Trained]) -> list[Trained]:
    """Put the whole tensors in the place of the processes' parts."""
    if any(one.error for one in trained):
        return trained
    weights = [_joined(mine.weights, [one.weights for one in trained]) for mine in trained]
    states = [_joined(mine.states, [one.states for one in trained]) for mine in trained]
    return [
        attrs.evolve(one, weights=own, states=kept)
        for one, own, kept in zip(trained, weights, states, strict=True)
    ]


def _joined(mine: Any, everyones: list[Any]) -> Any:
    import torch

    if isinstance(mine, Mapping):
        return {key: _joined(mine[key], [tree[key] for tree in everyones]) for key in mine}
    if not isinstance(mine, Part):
        return mine
    parts = {part.indices: part.values for part in everyones}
    # What was divided last is joined first.
    for dim in mine.dims:
        rows: dict[tuple[int, ...], list[Tensor]] = {}
        for (_, *outer), values in sorted(parts.items()):
            rows.setdefault(tuple(outer), []).append(values)
        parts = {outer: torch.cat(row, dim) for outer, row in rows.items()}
    return parts[()]
