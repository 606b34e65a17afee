"""Run one process of a job for the launcher, and report how it ended. Imports no torch.

``launch`` starts this file once for each process, by its path. It runs between the launcher and the
process for three reasons:

- It writes how and when the process ended, which torch's agent does not return.
- It ends only when all processes of this node have ended. Torch's agent sees the first end only
  then, so it kills no process that still saves.
- On Linux it sends SIGTERM to the process when the launcher ends, by ``kill -9`` too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, TextIO

FOLDER = "FUNDAMENTALLM_LAUNCH"
PARENT_ENDS = 1  # PR_SET_PDEATHSIG of Linux's prctl
ASKS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)


class Supervised:
    """The process, and the signals that have come."""

    def __init__(self, launcher: int, grace: int) -> None:
        self.launcher, self.grace = launcher, grace
        self.process: subprocess.Popen[bytes] | None = None
        self.signals: list[int] = []

    def pass_on(self, number: int, _: object) -> None:
        """Send a signal to the process; limit its time if the launcher no longer does.

        Each signal is passed on once. The kernel sends SIGTERM for each thread of the launcher that
        ends, and a signal to a whole group comes twice.
        """
        if os.getppid() != self.launcher:
            signal.alarm(self.grace)
        if number in self.signals:
            return
        self.signals.append(number)
        if self.process is not None:
            self.process.send_signal(number)

    def start(self, command: list[str], environment: dict[str, str]) -> None:
        """Start the process; it ends with this one."""
        end_too = partial(end_with_parent, os.getpid())
        self.process = subprocess.Popen(
            command,
            env=environment,
            preexec_fn=end_too,  # noqa: PLW1509 - there is one thread
        )
        for number in self.signals:  # those that came before
            self.process.send_signal(number)

    def wait_for_others(self, folder: Path, alive: TextIO, processes: int) -> None:
        """Wait until all processes of this node have begun and ended."""
        while os.getppid() == self.launcher and len([*folder.glob("*.begun")]) < processes:
            time.sleep(0.02)
        # The shared lock is given up first, so this returns once no process has it.
        fcntl.flock(alive, fcntl.LOCK_EX)


def end_with_parent(parent: int) -> None:
    """Let the kernel send SIGTERM to this process when its parent ends; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_ENDS, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it has ended before the request
        os._exit(128 + signal.SIGTERM)


def kill_group(*_: object) -> None:
    """End the process and all that it has started, and this one."""
    os.killpg(0, signal.SIGKILL)


def report(folder: Path, rank: int, status: int) -> None:
    """Write how and when the process ended; the file appears once it is complete."""
    unfinished = folder / f"{rank}.part"
    ending = {"rank": rank, "status": status, "time": time.monotonic()}
    unfinished.write_text(json.dumps(ending))
    unfinished.rename(folder / f"{rank}.ended")


def main() -> int:
    """Run the process; return its exit code, 128 plus the number of the signal that killed it."""
    environment = dict(os.environ)
    folder = Path(environment.pop(FOLDER))
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    supervised = Supervised(plan["launcher"], plan["grace"])
    for number in ASKS:
        signal.signal(number, supervised.pass_on)
    signal.signal(signal.SIGALRM, kill_group)
    end_with_parent(supervised.launcher)
    with (folder / "alive").open("w") as alive:
        fcntl.flock(alive, fcntl.LOCK_SH)
        (folder / f"{environment['RANK']}.begun").touch()
        supervised.start(plan["command"], environment | plan["environment"])
        assert supervised.process is not None
        status = supervised.process.wait()
        # If the disk of the temporary folder is full, the agent still gets the exit code.
        with contextlib.suppress(OSError):
            report(folder, int(environment["RANK"]), status)
            supervised.wait_for_others(folder, alive, int(environment["LOCAL_WORLD_SIZE"]))
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main())
