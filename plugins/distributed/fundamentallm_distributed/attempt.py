"""One attempt: the processes from one start to their end, and what the launcher does meanwhile."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click

from fundamentallm_distributed.endings import ASKED, Ending, cause
from fundamentallm_distributed.supervise import FOLDER

if TYPE_CHECKING:
    from torch.distributed.elastic.agent.server.api import ElasticAgent, RunResult

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
NOTICE = 2.0
"""Seconds in which the other processes can end by themselves after the first one has failed."""
AFTER_FAILURE = 30
"""Seconds after which they are killed: they have nothing to save but a write that is under way."""


def say(text: str) -> None:
    """Print a line between those of the processes."""
    click.echo(f"launch: {text}", err=True)


class Requests:
    """The signals that ask for the end.

    While processes run, signals are collected, and ``Attempt.look`` passes them on. Else a signal
    ends the launcher.
    """

    def __init__(self) -> None:
        self.collected: list[int] = []
        self.attempt: Attempt | None = None

    def receive(self, number: int, _: object) -> None:
        """Handle a signal; each number is collected once."""
        if self.attempt is None or not self.attempt.running():
            raise SystemExit(128 + number)
        if number not in self.collected:
            self.collected.append(number)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Receive the signals within this context."""
        before = {number: signal.signal(number, self.receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)


@attrs.define
class Attempt:
    """The processes of this node from one start to their end."""

    folder: Path
    """Where ``supervise`` reports; empty at the start."""
    command: tuple[str, ...]
    processes: int
    grace: int
    requests: Requests
    agent: ElasticAgent | None = None
    begun: bool = False
    passed: int = 0
    """How many of the signals that came have been passed on."""
    stopped: float = math.inf
    """When the launcher itself asked the processes to end, in seconds of ``time.monotonic()``."""
    deadline: float = math.inf
    """When it kills them."""

    def begin(self, environment: dict[str, str]) -> None:
        """Write what ``supervise`` needs; torch's agent starts it next."""
        plan = {
            "command": self.command,
            "environment": environment,
            "launcher": os.getpid(),
            "grace": self.grace,
        }
        (self.folder / "plan.json").write_text(json.dumps(plan))
        os.environ[FOLDER] = str(self.folder)
        self.begun = True  # from now on, a signal is for the processes

    def endings(self) -> list[Ending]:
        """Return how the processes that have ended by now ended."""
        found = self.folder.glob("*.ended")
        return [Ending(**json.loads(path.read_text())) for path in found]

    def running(self) -> bool:
        """Return whether there are processes that a signal can be passed on to."""
        return self.begun and len(self.endings()) < self.processes

    def look(self, nodes_waiting: int) -> bool:
        """Pass signals on, and stop the other processes after the first failure.

        The processes are also stopped if nodes wait to join; returns whether this call did so.
        """
        if len(list(self.folder.glob("*.begun"))) < self.processes:
            return False  # a signal would end a supervisor that cannot pass it on yet
        for number in self.requests.collected[self.passed :]:
            self.passed += 1
            name, many = signal.Signals(number).name, "es" * (self.processes > 1)
            say(f"{name}: waiting up to {self.grace} seconds for the process{many} to save and end")
            self._ask(number, self.grace)
        now, first = time.monotonic(), cause(self.endings())
        if now > self.deadline:
            self._kill()
        elif self.deadline < math.inf:
            pass
        elif first is not None and now > first.time + NOTICE:
            asked = first.exit_code in ASKED
            # Processes that end since another one was asked to are saving, as that one.
            self.stopped = math.inf if asked else now
            self._ask(signal.SIGTERM, self.grace if asked else min(self.grace, AFTER_FAILURE))
        elif first is None and nodes_waiting:
            self.stopped = now
            self._ask(signal.SIGTERM, self.grace)
            return True
        return False

    def cause(self, result: RunResult | None) -> Ending | None:
        """Return the ending that made the others end, or None if all processes finished."""
        known = {ending.rank: ending for ending in self.endings()}
        # Those whose supervisor was killed, too.
        for rank, failure in (result.failures if result else {}).items():
            known.setdefault(rank, Ending(rank, failure.exitcode))
        return cause(known.values(), self.stopped)

    def _ask(self, number: int, seconds: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + seconds)
        for worker in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.id, number)

    def _kill(self) -> None:
        self.deadline = math.inf
        for worker in self._left():
            say(f"process {worker.global_rank} has not ended in time: sending SIGKILL")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.id, signal.SIGKILL)

    def _left(self) -> list[Any]:
        assert self.agent is not None
        ended = {ending.rank for ending in self.endings()}
        workers = self.agent.get_worker_group().workers
        return [worker for worker in workers if worker.global_rank not in ended]
