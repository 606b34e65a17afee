"""Requeue a SLURM job whose time limit ends the run."""

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
"""Seconds to wait for ``scontrol``."""


@plugin
class Slurm:
    """Requeue the SLURM job of a run when a signal ends the run before its length."""

    role = "observer"

    signals: list[str] = field(factory=lambda: ["SIGUSR1", "SIGTERM"])
    """Names of the signals after which the job is requeued; ``run.max_time`` ends with
    ``SIGUSR1``, too."""

    before = ("console",)  # before it closes its log

    def __attrs_post_init__(self) -> None:
        known = signal.Signals.__members__
        for name in self.signals:
            if name not in known:
                raise ValueError(f"signals: there is no signal {name!r}")

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Log whether this process is a job that can be requeued."""
        job = os.environ.get("SLURM_JOB_ID")
        if job is None:
            log.info("slurm: this is no SLURM job; nothing will be requeued")
        elif os.environ.get("SLURM_RESTART_COUNT"):
            log.info(
                "slurm: job %s, started %s times before", job, os.environ["SLURM_RESTART_COUNT"]
            )

    @hookimpl
    def on_train_end(self, run: Run, outcome: Outcome) -> None:
        """Requeue the job if a signal ended the run before its length."""
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
            log.warning("slurm: job %s could not be requeued: %s", job, error)
            return
        if done.returncode:
            log.warning("slurm: job %s could not be requeued: %s", job, done.stderr.strip())
        else:
            log.info("slurm: job %s is requeued", job)
