"""Run PyTorch's profiler over chosen steps."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from fundamentallm import Run, field, ge, hookimpl, plugin

if TYPE_CHECKING:
    from fundamentallm_profiler.recording import Recording

log = logging.getLogger("fundamentallm")


@plugin
class Profiler:
    """Record the operations of some steps as a trace and a table.

    The other steps are not changed. An error of the profiler does not end the run.
    """

    role = "observer"

    start: int = field(default=10, validator=ge(1))
    """The first step that is recorded."""
    steps: int = field(default=3, validator=ge(1))
    """Number of recorded steps in one trace."""
    warmup: int = field(default=2, validator=ge(0))
    """Steps before those in which the profiler runs without recording, because it starts slowly."""
    traces: int = field(default=1, validator=ge(1))
    """Number of traces."""
    every: int = field(default=1000, validator=ge(1))
    """Steps from the start of one trace to the start of the next."""
    rows: int = field(default=30, validator=ge(1))
    """Lines of the table."""
    record_shapes: bool = False
    """Record the shapes of inputs."""
    profile_memory: bool = False
    """Record each allocation and release of a tensor's memory."""
    with_stack: bool = False
    """Record which line of Python called; it slows the recorded steps down."""
    with_flops: bool = False
    """Estimate the operations of matrix products and convolutions."""
    memory_snapshot: bool = True
    """On CUDA, write which blocks of memory are in use after the last recorded step."""
    all_ranks: bool = False
    """Record in every process of a distributed run, not just in the first."""

    def __attrs_post_init__(self) -> None:
        if self.traces > 1 and self.every < self.steps + self.warmup:
            needed = f"{self.steps} recorded and {self.warmup} before them"
            raise ValueError(f"every: {self.every} steps are fewer than {needed}")
        # Not settings, not state: what lives as long as the process.
        self.recording: Recording | None = None
        self._due: list[int] = []
        self._next = math.inf

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Choose the steps to record; start the profiler if the next step is one of them."""
        firsts = range(self.start, self.start + self.traces * self.every, self.every)
        if self.all_ranks or run.rank == 0:
            # A trace whose first step is over when a run is continued is left out.
            self._due = [first for first in firsts if first > run.progress.step]
        self._look_ahead()
        if run.progress.step >= self._next:
            self._begin(run)

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        """Advance the profiler by a step, or start it if it is due."""
        if self.recording is not None:
            recording, self.recording = self.recording, None
            self.recording = None if recording.step_over() else recording
        if run.progress.step >= self._next and self.recording is None:
            self._begin(run)

    @hookimpl
    def on_train_end(self) -> None:
        """Write the trace of the steps that were recorded so far."""
        if self.recording is not None:
            recording, self.recording = self.recording, None
            recording.end()

    def _look_ahead(self) -> None:
        """Compute after which step the profiler starts next."""
        self._next = self._due[0] - self.warmup - 1 if self._due else math.inf

    def _begin(self, run: Run) -> None:
        if run.ending:
            return
        first = max(self._due.pop(0), run.progress.step + 1)
        self._look_ahead()
        others = [one for one in run.plugins.values() if isinstance(one, Profiler)]
        if any(one.recording is not None for one in others):
            log.warning("profiler: no trace of step %d: PyTorch records one at a time", first)
            return
        from fundamentallm_profiler.recording import Recording

        self.recording = Recording(run, self, first)
