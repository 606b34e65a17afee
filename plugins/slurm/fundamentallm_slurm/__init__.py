"""Runs that outlive the time limit of a batch job."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from typing import TYPE_CHECKING

from fundamentallm import field, hookimpl, plugin

if TYPE_CHECKING:
    from fundamentallm import Outcome, Run

log = logging.getLogger("fundamentallm")
PATIENCE = 60


@plugin
class Slurm:
    """Put the SLURM job of a run back into the queue when the run is stopped before its end."""

    role = "observer"

    signals: list[str] = field(factory=lambda: ["SIGUSR1", "SIGTERM"])
    """The signals, by name, after which the job is to be queued again; ``SIGUSR1`` is also what
    ``run.max_time`` ends with."""

    before = ("console",)  # what it says at the end belongs into the log

    def __attrs_post_init__(self) -> None:
        known = signal.Signals.__members__
        for name in self.signals:
            if name not in known:
                raise ValueError(f"signals: there is no signal {name!r}")

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Tell whether this is a job that can be queued again."""
        job = os.environ.get("SLURM_JOB_ID")
        if job is None:
            log.info("slurm: this is no SLURM job; nothing will be queued again")
        elif os.environ.get("SLURM_RESTART_COUNT"):
            log.info(
                "slurm: job %s, started %s times before", job, os.environ["SLURM_RESTART_COUNT"]
            )

    @hookimpl
    def on_train_end(self, run: Run, outcome: Outcome) -> None:
        """Queue the job again if a signal ended the run before its length."""
        job = os.environ.get("SLURM_JOB_ID")
        meant = run.signal is not None and signal.Signals(run.signal).name in self.signals
        if job is None or outcome != "interrupted" or not meant or run.rank:
            return
        command = ["scontrol", "requeue", job]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=PATIENCE, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            log.warning("slurm: job %s could not be queued again: %s", job, error)
            return
        if done.returncode:
            log.warning("slurm: job %s could not be queued again: %s", job, done.stderr.strip())
        else:
            log.info("slurm: job %s is queued again", job)
