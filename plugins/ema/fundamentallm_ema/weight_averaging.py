"""The common part of ``ema`` and ``swa``: everything but how weights enter the average."""

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


class WeightAveraging(ABC):
    """Update an ``Average`` of the weights, save it in checkpoints, and evaluate with it."""

    start: Period | float
    every: Period
    evaluate: bool
    save: bool

    _average: Any = None  # an Average, made when it is first needed
    _restored: Any = None  # the state of a checkpoint, until the Average is made

    @abstractmethod
    def rule(self) -> Rule:
        """Return how weights enter the average."""

    def apply_settings(self) -> None:
        """Apply ``evaluate``; raise ``ValueError`` for a wrong fraction."""
        if not self.evaluate:  # so that another plugin may answer evaluation_weights
            self.evaluation_weights = None  # type: ignore[assignment,method-assign]
        if not isinstance(self.start, Period) and not 0 <= self.start < 1:
            raise ValueError(
                f"start: a fraction of the run is at least 0 and less than 1, got {self.start:g};"
                f" for a number of steps write it without a point"
            )

    @hookimpl
    def on_run_start(self) -> None:
        """Forget the average of an earlier run of this object."""
        self._average = self._restored = None

    @hookimpl
    def settle_step(self, run: Run, applied: bool) -> None:
        """Add the weights to the average after an applied update, when `every` is due."""
        if not applied or not self.every.due(run.progress):
            return
        average: Average = self._average or self.average_of(run)
        if average.count or self._has_started(run):
            average.add()

    @hookimpl
    def evaluation_weights(self, run: Run) -> AbstractContextManager[None]:
        """Return a context in which the model contains the average, once it has begun."""
        in_place: AbstractContextManager[None] = self.average_of(run).in_place()
        return in_place

    @hookimpl
    def on_train_end(self, run: Run, outcome: Outcome) -> None:
        """Write the averaged model with `save`, if the run is finished or stopped."""
        if outcome not in ("finished", "stopped"):
            return
        average = self.average_of(run)
        name = run.name_of(self)
        if not average.count:
            if run.rank == 0:
                text = "%s: the run ended before the average began: start is %s"
                log.warning(text, name, self.start)
        elif self.save:
            from fundamentallm_ema.export import write_weights

            path = run.folder / f"{name}.safetensors"
            with average.in_place():
                weights = run.hook.gather(run=run, tree=dict(run.model.state_dict()))
                run.from_first(lambda: write_weights(path, weights))

    def average_of(self, run: Run) -> Average:
        """Return the average of the weights of ``run``, which may still be empty."""
        if self._average is None:
            from fundamentallm_ema.average import Average

            self._average = Average(run.model, self.rule())
            if self._restored is not None:
                self._average.restore(
                    self._restored,
                    lambda whole, like: run.hook.spread(run=run, tensor=whole, like=like),
                )
            self._restored = None
        average: Average = self._average
        return average

    def get_state(self) -> dict[str, Any]:
        """Return the average and the number of weights in it."""
        if self._average is not None:
            state: dict[str, Any] = self._average.state()
            return state
        return self._restored or {"count": 0, "weights": {}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a saved average, which may replace a later one (after a rewind)."""
        self._average, self._restored = None, state

    def _has_started(self, run: Run) -> bool:
        if isinstance(self.start, Period):
            return self.start.reached(run.progress)
        return run.settings.length.done(run.progress) >= self.start
