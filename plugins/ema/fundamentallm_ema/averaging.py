"""What the plugins of this distribution have in common: all but how weights enter the average."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from fundamentallm import Period, hookimpl

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from fundamentallm import Outcome, Run
    from fundamentallm_ema.average import Average, Rule

log = logging.getLogger("fundamentallm")


class Averaging(ABC):
    """Keeps an ``Average`` of the weights up to date, in checkpoints, and in use."""

    start: Period | float
    every: Period
    evaluate: bool
    save: bool

    _average: Any = None  # an Average, once the model is asked for
    _kept: Any = None  # what a checkpoint held, until then

    @abstractmethod
    def rule(self) -> Rule:
        """Return how weights enter the average."""

    def settle(self) -> None:
        """Follow the settings; raise ``ValueError`` for a fraction that is none."""
        if not self.evaluate:  # hidden, so that another plugin may say what to evaluate with
            self.evaluation_weights = None  # type: ignore[assignment,method-assign]
        if not isinstance(self.start, Period) and not 0 <= self.start < 1:
            raise ValueError(
                f"start: a fraction of the run is at least 0 and less than 1, got {self.start:g};"
                f" for a number of steps leave out the point"
            )

    @hookimpl
    def settle_step(self, run: Run, applied: bool) -> None:
        """Let the weights enter the average, if they were updated and it is due."""
        # A step that was rejected has nothing new to say, even if it is the one that was due.
        if not applied or not self.every.due(run.progress):
            return
        average: Average = self._average or self.average_of(run)
        if average.count or self._begins(run):
            average.add()

    @hookimpl
    def evaluation_weights(self, run: Run) -> AbstractContextManager[None]:
        """Put the average in place of the weights for a while, once there is one."""
        in_place: AbstractContextManager[None] = self.average_of(run).in_place()
        return in_place

    @hookimpl
    def on_train_end(self, run: Run, outcome: Outcome) -> None:
        """Write the averaged model, if that is wanted and the run is done."""
        if outcome not in ("finished", "stopped") or run.rank:
            return
        average = self.average_of(run)
        name = next(name for name, instance in run.plugins.items() if instance is self)
        if not average.count:
            log.warning("%s: the run ended before the average began: start is %s", name, self.start)
        elif self.save:
            from fundamentallm_ema.export import write

            with average.in_place():
                write(run.folder / f"{name}.safetensors", run.model)

    def average_of(self, run: Run) -> Average:
        """Return the average of the weights of ``run``, which may not have begun."""
        if self._average is None:
            from fundamentallm_ema.average import Average

            self._average = Average(run.model, self.rule())
            if self._kept is not None:
                self._average.restore(self._kept)
            self._kept = None
        average: Average = self._average
        return average

    def get_state(self) -> dict[str, Any]:
        """Return the average and how many weights it holds."""
        if self._average is not None:
            state: dict[str, Any] = self._average.state()
            return state
        return self._kept or {"count": 0, "weights": {}}

    def set_state(self, kept: dict[str, Any]) -> None:
        """Take an average back, also in place of a later one."""
        self._average, self._kept = None, kept

    def _begins(self, run: Run) -> bool:
        if isinstance(self.start, Period):
            return self.start.reached(run.progress)
        return run.settings.length.done(run.progress) >= self.start
