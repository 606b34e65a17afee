"""The metrics of a run in event files for TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fundamentallm import field, hookimpl, plugin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fundamentallm import Run


@plugin
class Tensorboard:
    """Write every row of metrics to event files under ``tensorboard/`` in the run folder.

    Each metric is a scalar under its own name; the settings are a text and the values of the
    HParams tab. A run that is resumed or goes back makes the points of the steps
    that it makes again void, so that no point is shown twice; one that starts anew where points
    are already keeps them in a folder beside.
    """

    role = "observer"

    hparams: bool = True
    """Whether the settings also appear in the HParams tab, where runs are compared by them."""

    _events: Any = field(init=False, default=None)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Begin an event file, which makes points of steps that are still to come void."""
        if run.rank == 0:
            from fundamentallm_tensorboard.events import EventFile, begin_anew

            folder = run.folder / "tensorboard"
            if run.progress.step == 0:
                begin_anew(folder)
            self._events = EventFile(folder)
            # What a signal kept from being logged is logged as soon as the run goes on.
            self._begin(run, run.progress.logged_step)

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Make the points of the steps that have become void disappear."""
        if self._events is not None:
            self._begin(run, run.progress.step)

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """Append a row, in one write."""
        if self._events is not None:
            self._events.scalars(run.progress.step, metrics)

    @hookimpl
    def on_histogram(
        self, name: str, step: int, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Append a histogram."""
        if self._events is not None:
            self._events.histogram(name, step, edges, counts)

    @hookimpl
    def on_train_end(self) -> None:
        """Close the file."""
        if self._events is not None:
            events, self._events = self._events, None
            events.close()

    def _begin(self, run: Run, settled: int) -> None:
        self._events.purge(settled + 1)
        # At the first step that is made with them, so that going back makes them void, too.
        self._events.settings(settled + 1, run.tables, self.hparams)
