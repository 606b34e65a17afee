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

from fundamentallm import FundamentalError, Outcome, Run, find_plugins, hookimpl, plugin
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
            whole = Whole()
            composed = compose_tiny(*plugins, kind, whole, settings=tables, **run)
            return _trained(composed, run_dir or tmp_path / "run", whole)

        return in_processes(processes, work, patience=patience)

    return start


@plugin
class Whole:
    """Keeps whole copies of weights and states, while the processes can still exchange tensors."""

    role = "control"

    def __attrs_post_init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.states: dict[str, Any] = {}

    @hookimpl
    def on_train_end(self, run: Run, outcome: Outcome) -> None:
        """Copy them; after an error in one process, the others would wait for it."""
        if outcome != "failed":
            self.weights = _whole(dict(run.model.state_dict()))
            listed = {name: other for name, other in run.plugins.items() if other is not self}
            self.states = {name: _whole(get_state(other)) for name, other in listed.items()}


def _whole(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _whole(value) for key, value in tree.items()}
    tree = tree.full_tensor() if hasattr(tree, "full_tensor") else tree
    return tree.detach().cpu().clone() if hasattr(tree, "detach") else tree


def _trained(composed: Any, folder: Path, whole: Whole) -> Trained:
    from fundamentallm import train

    try:
        run = train(composed, run_dir=folder)
    except FundamentalError as error:
        return Trained("failed", 0, [], {}, {}, folder, error)
    ended = run.outcome, run.progress.step, run.history
    return Trained(*ended, whole.weights, whole.states, run.folder)
