"""Start a command of fundamentallm as several processes, each with the variables of torchrun."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import attrs
import forked

from fundamentallm.testing.processes import Place, free_port

LIMIT = 100  # seconds until a command that has not ended hangs


@attrs.frozen
class Ended:
    """How a process has ended, and what it printed."""

    code: int
    output: str
    errors: str


def start(words: list[str], folder: Path, count: int = 2) -> list[forked.Popen]:
    """Start ``fundamentallm`` with ``words`` in ``count`` processes."""
    port, started = free_port(), []
    for rank in range(count):
        variables = os.environ | Place(rank, count, port).variables()
        called = ["python", "-m", "fundamentallm", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(forked.Popen(called, cwd=folder, env=variables, **pipes))
    return started


def start_alone(words: list[str], folder: Path) -> forked.Popen:
    """Start ``fundamentallm`` with ``words`` in one process."""
    called = ["python", "-m", "fundamentallm", *words]
    return forked.Popen(called, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kill_with_children(pid: int) -> None:
    """Kill a process and all that it has started, at once."""
    below = [pid]
    for parent in below:
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                # The name of the command, in parentheses, may contain spaces.
                if int(path.read_text().rpartition(")")[2].split()[1]) == parent:
                    below.append(int(path.parent.name))
    # Stopped first: none of them may still act on the death of another.
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for one in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, number)


def wait(started: list[forked.Popen]) -> list[Ended]:
    """Wait until all have ended; kill those that hang, which is a failure."""
    try:
        outputs = [process.communicate(timeout=LIMIT) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
    return [
        Ended(process.returncode, output.decode(), errors.decode())
        for process, (output, errors) in zip(started, outputs, strict=True)
    ]


def run(words: list[str], folder: Path, count: int = 2) -> list[Ended]:
    """Run ``fundamentallm`` with ``words`` in ``count`` processes until all have ended."""
    return wait(start(words, folder, count))
