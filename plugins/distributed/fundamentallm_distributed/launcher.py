"""The command ``launch``: attempts of torch's elastic agent, until no restart follows."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import TypeVar, cast

import attrs
import torch
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend

from fundamentallm import PeerError
from fundamentallm_distributed.attempt import Attempt, Requests, say
from fundamentallm_distributed.endings import PEER_LOST, Ending
from fundamentallm_distributed.meeting import Meeting, Verdict

T = TypeVar("T")
ALONE = "127.0.0.1:0"
LOOK_EVERY = 0.1
"""Seconds between two moments at which a signal is handled."""


@attrs.frozen
class Job:
    """What to start, and where."""

    command: tuple[str, ...]
    processes: int = 1
    """Processes of this node."""
    nodes: tuple[int, int] = (1, 1)
    """The least and the largest number of nodes."""
    meet: str = ALONE
    """``host:port`` at which the launchers of several nodes meet."""
    address: str | None = None
    """The address of this node for the others; None: its host name."""
    name: str = "fundamentallm"
    """What the launchers of one job have in common."""
    restarts: int = 0
    grace: int = 300
    """Seconds between the request to end and SIGKILL."""


def launch(job: Job) -> int:
    """Run the processes to their end; return the exit code of the first one that failed, or 0.

    Raises ``PeerError`` if the launchers of several nodes do not meet. A signal that comes while
    no process runs raises ``SystemExit``.
    """
    prepare(job)
    requests = Requests()
    with requests.installed(), tempfile.TemporaryDirectory(prefix="fundamentallm-") as folder:
        last: Ending | None = None
        try:
            meeting = open_meeting(job)
            while True:
                empty = Path(tempfile.mkdtemp(dir=folder))
                ending, again = run_attempt(job, meeting, requests, empty)
                last = ending or last
                if not again:
                    meeting.close(finished=ending is None)
                    return ending.exit_code if ending else 0
        except RendezvousClosedError:
            say("the launchers of the other nodes have ended the job")
            return last.exit_code if last else PEER_LOST
        except RendezvousError as error:
            raise PeerError(f"{job.meet}: {explain(job, error)}") from error


def automatic_processes() -> int:
    """Return the number of CUDA devices of this machine, or 1."""
    return max(1, torch.cuda.device_count())


def prepare(job: Job) -> None:
    """Set what the processes inherit, and silence the agent."""
    # Without this, all processes together would have as many threads as processes times cores.
    threads = max(1, torch.get_num_threads() // job.processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # The agent's handlers would end it at the second signal, and leave the processes behind.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ""
    if job.nodes[1] > 1:
        # Else the processes of a new attempt would read addresses of those that ended.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    agent = logging.getLogger("torch.distributed.elastic")
    agent.addHandler(logging.NullHandler())
    agent.propagate = False


def open_meeting(job: Job) -> Meeting:
    """Open the meeting point, or connect to it."""
    alone, (least, most) = job.meet == ALONE, job.nodes
    where = RendezvousParameters("c10d", job.meet, job.name, least, most)
    if alone:
        where.config["is_host"] = True
    else:
        say(f"meeting {many(job)} at {job.meet}")
    backend, store = create_backend(where)
    address = "127.0.0.1" if alone else job.address
    meeting: Meeting = Meeting.from_backend(job.name, store, backend, least, most, address)
    meeting.several, meeting.most_restarts = most > 1, job.restarts
    return meeting


def run_attempt(
    job: Job, meeting: Meeting, requests: Requests, folder: Path
) -> tuple[Ending | None, bool]:
    """Start the processes and wait for their end.

    Returns the ending that caused it, None if all finished, and whether a new attempt follows.
    """
    attempt = Attempt(folder, job.command, job.processes, job.grace, requests)
    requests.attempt = meeting.attempt = attempt
    spec = WorkerSpec(
        role="train",
        local_world_size=job.processes,
        rdzv_handler=meeting,
        entrypoint=sys.executable,
        # By its path: as a module, it would import the package and torch.
        args=("-I", "-S", str(Path(__file__).with_name("supervise.py"))),
        max_restarts=0,
        local_addr=job.address,
    )
    attempt.agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=os.devnull))
    result = in_thread(attempt.agent.run)
    ending = attempt.cause(result)
    if ending is None:
        return None, False
    return decide(job, meeting, attempt, meeting.agree(ending, attempt))


def in_thread(work: Callable[[], T]) -> T:
    """Return what ``work`` returns in another thread, while this one receives signals.

    In the main thread, the agent of torch 2.9 installs signal handlers that end it.
    """
    results: Queue[tuple[T | None, BaseException | None]] = Queue()

    def run() -> None:
        try:
            results.put((work(), None))
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            results.put((None, error))

    # A daemon: a launcher that a signal ends does not wait for machines that do not come.
    Thread(target=run, name="agent", daemon=True).start()
    while True:
        with contextlib.suppress(Empty):
            result, error = results.get(timeout=LOOK_EVERY)
            if error is not None:
                raise error
            return cast("T", result)


def decide(job: Job, meeting: Meeting, attempt: Attempt, verdict: Verdict) -> tuple[Ending, bool]:
    """Return the ending that counts, and whether a new attempt follows; print a line about it."""
    ending, asked = verdict.ending, bool(attempt.requests.collected)
    if verdict.joined:
        say("nodes have come or gone; starting again from the newest checkpoint")
        return ending, True
    left = job.restarts - meeting.restarts
    if asked or ending.final or left <= 0 or meeting.lost:
        lost = f"; {job.meet} cannot be reached any more" if meeting.lost else ""
        final = f"; {ending.final}" if job.restarts and ending.final else lost
        say(f"{ending}{final}")
        return ending, False
    meeting.restarts += 1
    say(f"{ending}; restarting, {left - 1} of {job.restarts} restarts left")
    return ending, True


def explain(job: Job, error: RendezvousError) -> str:
    """Say what may be wrong if the launchers do not meet."""
    cause = error.__cause__ or str(error) or type(error).__name__
    return (
        f"the launchers of {many(job)} did not meet: {cause};"
        " --meet must name one of the machines, on which a launcher runs,"
        " and a port of it that the others can reach"
    )


def many(job: Job) -> str:
    """Return the number of nodes in words."""
    least, most = job.nodes
    return f"{least} to {most} nodes" if most > least else f"{most} nodes"
