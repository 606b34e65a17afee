"""Write the metrics of a run to event files for TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fundamentallm import field, hookimpl, plugin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fundamentallm import Run


@plugin
class Tensorboard:
    """Write every row of metrics to event files under ``tensorboard/`` in the run folder.

    Each metric is a scalar under its own name. The settings are a text and the values of the
    HParams tab. A run that is resumed or rewound invalidates the points of the steps that it
    repeats, so that no point is shown twice. A run that starts at step 0 renames an existing
    ``tensorboard/``.
    """

    role = "observer"

    hparams: bool = True
    """Whether the settings also appear in the HParams tab, where runs are compared by them."""

    _events: Any = field(init=False, default=None)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Open a new event file, and invalidate the points of later steps."""
        if run.rank == 0:
            from fundamentallm_tensorboard.events import EventFile, move_old

            folder = run.folder / "tensorboard"
            if run.progress.step == 0:
                move_old(folder)
            self._events = EventFile(folder)
            # A signal may have prevented the row of the last step. The resumed run logs it first.
            self._begin(run, run.progress.logged_step)

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Invalidate the points of the steps after the checkpoint."""
        if self._events is not None:
            self._begin(run, run.progress.step)

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """Append the row to the event file in one write."""
        if self._events is not None:
            self._events.scalars(run.progress.step, metrics)

    @hookimpl
    def on_histogram(
        self, name: str, step: int, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Append a histogram to the event file."""
        if self._events is not None:
            self._events.histogram(name, step, edges, counts)

    @hookimpl
    def on_train_end(self) -> None:
        """Close the event file."""
        if self._events is not None:
            events, self._events = self._events, None
            events.close()

    def _begin(self, run: Run, settled: int) -> None:
        self._events.purge(settled + 1)
        # At the first step with these settings, so that a later rewind invalidates them, too.
        self._events.settings(settled + 1, run.tables, self.hparams)
