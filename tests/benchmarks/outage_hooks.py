"""Measure the time of the hooks of ``mlflow`` in a step while its server works, is dead, and hangs.

``python tests/benchmarks/outage_hooks.py`` trains a tiny model with a row of metrics in every step
and a validation in every fiftieth. For the middle third the server is killed; later it is stopped
for twenty seconds, and continued. Every call of a hook of the plugin is timed, and added up by step.
In each phase, 99 of 100 steps are to spend at most 1 ms in them. Exit code 1 if they spend more.

It also prints in how many steps a hook waited for something, such as a disk: the system counts the
voluntary switches of the thread. And it prints the time of a loop without system calls in the same
steps: on a machine with more load than cores, both sometimes wait for a processor.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import noop

from fundamentallm import Run, hookimpl, plugin, train
from fundamentallm.testing import compose_tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BOUND = 1000.0  # microseconds
PAUSE = 0.02  # seconds between two steps: the tiny model takes none to speak of
THIRD = 800
# Where each phase begins: the first and the last third are those of a run with a dead server.
PHASES = {
    "healthy": 1,
    "dead": THIRD,
    "back": 2 * THIRD,
    "hung": 3 * THIRD,
    "back again": 3 * THIRD + int(20 / PAUSE),
}
STEPS = PHASES["back again"] + THIRD
LOOP = 4000  # rounds


class Server:
    """An MLflow server, which can be begun again on the same port and database."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.begin()
        until = time.monotonic() + 120
        while not self.answers():
            if time.monotonic() > until:
                raise TimeoutError("the server does not start")
            time.sleep(0.2)

    def begin(self) -> None:
        """Start, and do not wait for it."""
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        words = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--port",
            str(self.port),
            "--workers",
            "1",
            "--backend-store-uri",
            f"sqlite:///{self.folder / 'served.db'}",
            "--artifacts-destination",
            str(self.folder / "files"),
        ]
        self.process = subprocess.Popen(
            words,
            env=dict(os.environ) | quiet,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5).read()
        except OSError:
            return False
        return True

    def send(self, number: int) -> None:
        """Send a signal to all of its processes."""
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


@plugin
class Outages:
    """Does to the server what each phase begins with, and times the hooks of ``mlflow``: ``took``
    has the microseconds of each step, how often they waited, and the microseconds of the loop."""

    server: Any
    took: Any

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        run.hook = run.bind(self.timed)
        send, begin = self.server.send, self.server.begin
        do = [
            lambda: None,
            lambda: send(signal.SIGKILL),
            begin,
            lambda: send(signal.SIGSTOP),
            lambda: send(signal.SIGCONT),
        ]
        self.doing = dict(zip(PHASES.values(), do, strict=True))

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        time.sleep(PAUSE)
        self.doing.get(run.progress.step + 1, lambda: None)()

    def timed(self, name: str, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(**given: Any) -> Any:
            waits, began = waited(), time.perf_counter()
            try:
                return call(**given)
            finally:
                ended = time.perf_counter()
                took = self.took.setdefault(given["run"].progress.step, [0.0, 0.0, 0.0])
                took[0] += 1e6 * (ended - began)
                took[1] += waited() - waits
                if hook == "on_log":
                    began = time.perf_counter()
                    for _ in range(LOOP):
                        pass
                    took[2] = 1e6 * (time.perf_counter() - began)

        return timing if name == "mlflow" and hook != "on_train_end" else call


def waited() -> int:
    """Return how often this thread has given up its processor by itself."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def share(took: tuple[float, ...], percent: int) -> float:
    """Return what ``percent`` of 100 steps do not exceed."""
    return quantiles(took, n=100)[percent - 1]


def measure() -> tuple[dict[int, list[float]], list[str]]:
    """Return the microseconds of each step, see ``Outages``, and the warnings about the server."""
    took: dict[int, list[float]] = {}
    warnings: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fundamentallm").addHandler(listener)
    with noop.quiet() as folder:
        server = Server(folder)
        tables = {
            "mlflow": {
                "tracking_uri": server.uri,
                "plot": False,
                "start_seconds": 120.0,
                "end_seconds": 300.0,
            }
        }
        try:
            train(
                compose_tiny(
                    "mlflow",
                    Outages(server=server, took=took),
                    settings=tables,
                    length=STEPS,
                    log_every=1,
                    validate_every=50,
                ),
                run_dir=folder / "run",
            )
        finally:
            server.send(signal.SIGCONT)
            server.send(signal.SIGKILL)
    return took, warnings


def report() -> bool:
    """Measure, print the results, and return whether they keep the bound."""
    took, warnings = measure()
    was_away = sum("cannot be used" in line for line in warnings)
    print(
        f"{STEPS} steps with a row each, {THIRD} with a dead server and {int(20 / PAUSE)} with one "
        f"that hangs; 'away' was logged {was_away} times"
    )
    within, busy = was_away > 0, False
    for name, first in PHASES.items():
        end = min((step for step in PHASES.values() if step > first), default=STEPS + 1)
        # Not the first row: it imports.
        wall, waits, loop = zip(*(took[step] for step in range(max(2, first), end)), strict=True)
        within, busy = within and share(wall, 99) <= BOUND, busy or share(loop, 99) > BOUND
        print(
            f"hooks of mlflow in a step, server {name}: p50 {share(wall, 50):.0f} us, "
            f"p99 {share(wall, 99):.0f} us (at most {BOUND:.0f}), max {max(wall):.0f} us; "
            f"waited in {sum(map(bool, waits))} of {len(waits)} steps; the loop p50 "
            f"{share(loop, 50):.0f} us, p99 {share(loop, 99):.0f} us: {'PASS' if share(wall, 99) <= BOUND else 'FAIL'}"
        )
    if busy:
        print(
            "  the machine is too busy to tell: a loop that asks for nothing takes too long as well"
        )
    return within


if __name__ == "__main__":
    sys.exit(not report())
