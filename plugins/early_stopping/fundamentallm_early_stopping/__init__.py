"""End a run when a metric no longer improves, is good enough, or diverges."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Literal

from fundamentallm import Period, Progress, SettingsError, field, ge, hookimpl, plugin, state

if TYPE_CHECKING:
    from fundamentallm import Run

__all__ = ["EarlyStopping"]


@plugin
class EarlyStopping:
    """Stop when ``monitor`` has not improved for ``patience``, is good enough, or diverges.

    Its decision depends on its settings and its measurements, which are in every checkpoint. A
    stopped run that is started again stays stopped until its settings change.
    """

    role = "control"

    monitor: str = "val/loss"
    """The metric to watch: one of a validation, or one of the logged rows (`train/loss`)."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger `monitor` is better."""
    patience: int | Period | Literal["unlimited"] = 5
    """How long to wait for an improvement: a number of consecutive measurements without one, or a
    period of training (`"2000 steps"`)."""
    min_delta: float = field(default=0.0, validator=ge(0))
    """Smallest change that counts as an improvement."""
    min_delta_mode: Literal["absolute", "relative"] = "absolute"
    """Whether `min_delta` is an amount or a fraction of the best value so far."""
    start: Period | None = None
    """When `patience` begins to count; the best value is tracked from the first measurement on."""
    stop_at: float | None = None
    """Stop with success when `monitor` is at least this good."""
    diverged_at: float | None = None
    """Stop at once when `monitor` is at least this bad; a value that is not finite always stops."""

    best: float | None = state(None)
    best_step: int = state(0)
    latest: float | None = state(None)
    stale: int = state(0)
    measured: list[float] = state(factory=list)  # step, samples, tokens, seconds of the latest
    waiting: list[float] = state(factory=list)  # the same at the begin of the wait
    watched: list[str] = state(factory=list)  # the metric and the mode of these measurements
    _validated: bool = field(init=False, default=True, repr=False)

    def __attrs_post_init__(self) -> None:
        if isinstance(self.patience, int) and self.patience < 1:
            raise ValueError(f"patience: must be >= 1, got {self.patience}")
        if self.stop_at is None or self.diverged_at is None:
            return
        if not self._better(self.stop_at, self.diverged_at):
            raise ValueError(
                f"diverged_at: {self.diverged_at:g} is no worse than stop_at = {self.stop_at:g}"
            )

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Check that the metric will be measured; keep a stopped run stopped."""
        name = run.name_of(self)
        self._validated = self.monitor.partition("/")[0] in run.data.validation()
        if self._validated and run.settings.validate_every is None:
            raise SettingsError(
                f"{name}: {self.monitor!r} is measured in validations, and the only one is at the"
                f" end: set run.validate_every"
            )
        if self.watched != [self.monitor, self.mode]:  # they are measurements of another metric
            self.best = self.latest = None
            self.stale, self.measured, self.waiting = 0, [], []
            self.watched = [self.monitor, self.mode]
        reason = self._reason(run.progress)
        if reason:
            run.stop(f"{reason}; to train on, change {name} in the settings")
            # A stop by a row takes effect after one more step; a killed run has yet to make it.
            run.ending |= self._validated or run.progress.step > self.measured[0]

    @hookimpl
    def on_validation_end(self, run: Run, metrics: dict[str, float]) -> None:
        """Measure a metric of the validation; a stop takes effect at this step."""
        self._measure(run, metrics)

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """Measure a metric of training; a stop takes effect after the next step."""
        self._measure(run, metrics)

    def _measure(self, run: Run, metrics: dict[str, float]) -> None:
        value, progress = metrics.get(self.monitor), run.progress
        # The row has the metrics of the validation again, and a resumed run may repeat both.
        if value is None or self.measured[:1] == [progress.step]:
            return
        if self._reason(progress):  # the decision is final
            return
        self._note(value, progress)
        reason = self._reason(progress)
        if reason:
            run.stop(reason)

    def _note(self, value: float, progress: Progress) -> None:
        counts = [progress.step, progress.samples, progress.tokens, progress.seconds]
        self.latest, self.measured = value, counts
        if math.isfinite(value) and self._improves(value):
            self.best, self.best_step = value, progress.step
            self.stale, self.waiting = 0, counts
        elif self.start is not None and not self.start.reached(progress):
            self.waiting = counts
        else:
            self.stale += 1

    def _improves(self, value: float) -> bool:
        if self.best is None:
            return True
        margin = self.min_delta * (abs(self.best) if self.min_delta_mode == "relative" else 1.0)
        return self._better(value, self.best - margin if self.mode == "min" else self.best + margin)

    def _better(self, one: float, other: float) -> bool:
        return one < other if self.mode == "min" else one > other

    def _reason(self, progress: Progress) -> str | None:
        """Return why to stop after the latest measurement, or None."""
        value = self.latest
        if value is None:
            return None
        now = f"{self.monitor} is {value:g} at step {self.measured[0]}"
        best = "" if self.best is None else f"; the best was {self.best:g} at step {self.best_step}"
        if not math.isfinite(value):
            return f"{now}{best}"
        if self.diverged_at is not None and not self._better(value, self.diverged_at):
            return f"{now}, and diverged_at is {self.diverged_at:g}{best}"
        if self.stop_at is not None and not self._better(self.stop_at, value):
            return f"{now}, and stop_at is {self.stop_at:g}"
        waited = self._waited(progress)
        return waited and f"{now}, without an improvement for {waited}{best}"

    def _waited(self, progress: Progress) -> str | None:
        """Return the length of the wait in words if it is too long, else None."""
        patience = self.patience
        if isinstance(patience, int):
            word = ("validation" if self._validated else "row") + ("s" if patience > 1 else "")
            return f"{self.stale} {word}" if self.stale >= patience else None
        if patience == "unlimited":
            return None
        step, samples, tokens, seconds = map(operator.sub, self.measured, self.waiting)
        since = Progress(
            step=int(step),
            samples=int(samples),
            tokens=int(tokens),
            seconds=seconds,
            epoch_samples=progress.epoch_samples,
        )
        return str(patience) if patience.reached(since) else None
