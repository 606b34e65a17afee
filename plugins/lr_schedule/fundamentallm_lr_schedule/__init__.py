"""Schedule the learning rate, and any other number that a plugin reads during the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fundamentallm import Period, SettingsError, field, ge, gt, hookimpl, le, optional, plugin
from fundamentallm_lr_schedule.checks import check_owner, check_settings
from fundamentallm_lr_schedule.schedules import Scheduled, Schedules
from fundamentallm_lr_schedule.segments import DecayShape, Levels, PiecewiseSchedule, Shape, lay_out

if TYPE_CHECKING:
    from fundamentallm import Run

__all__ = ["LrSchedule", "Scheduled", "Schedules"]


@plugin
class LrSchedule:
    """Change the learning rate over the run by a warmup and a shape.

    The factor is a pure function of the run's progress. A length is a period (`"500 steps"`, `"1e9
    tokens"`) or, written with a point, a fraction of the run (`0.1`). All lengths of a schedule
    have one unit; fractions have the unit of the run's length.
    """

    role = "training"

    shape: Shape = "cosine"
    """The shape of the learning rate after the warmup."""
    warmup: Period | float = 0.0
    """The length of the warmup, which is linear (for `one_cycle` a cosine)."""
    length: Period | float = 1.0
    """The end of the schedule, counted from the start of the run, so including the warmup. After it
    the learning rate is constant. `constant`, `inverse_sqrt` and `step` have no end."""
    decay_to: float = field(default=0.0, validator=[ge(0), le(1)])
    """The final learning rate as a fraction of the optimizer's: with `lr = 1e-3`, 0.1 ends at
    1e-4. Not used by `constant`, `inverse_sqrt` and `step`."""
    decay: Period | float | None = None
    """`wsd` only, required: the length of the decay at the end."""
    decay_shape: DecayShape | None = None
    """`wsd` only: the shape of the decay; `sqrt` is 1 - sqrt(x). By default linear."""
    cycle: Period | float | None = None
    """`cosine_with_restarts` only, required: the length of the first cycle."""
    cycle_growth: float | None = field(default=None, validator=optional(ge(1)))
    """`cosine_with_restarts` only: each cycle is this times as long as the previous one. By default
    1."""
    power: float | None = field(default=None, validator=optional(gt(0)))
    """`polynomial` only, required: the power of (1 - x)."""
    start: float | None = field(default=None, validator=optional([ge(0), le(1)]))
    """`one_cycle` only: the first learning rate as a fraction of the optimizer's. By default
    0.04."""
    at: list[Period | float] | Period | float | None = None
    """`step` only, required: the positions where the learning rate is multiplied by `gamma`,
    counted from the start of the run, such as `["30 epochs", "60 epochs"]`. One length instead of a
    list is a period."""
    gamma: float | None = field(default=None, validator=optional(gt(0)))
    """`step` only, required: the factor of the learning rate."""

    changeable = ()

    schedule: PiecewiseSchedule = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        check_settings(self)
        if self.start is not None:
            check_owner("one_cycle", self, "start")

    def prepare(self, run_length: Period) -> PiecewiseSchedule:
        """Make and return the schedule for a run of this length.

        Raises ``ValueError`` (``field: what is wrong``) if its lengths do not fit together.
        """
        start = 0.0
        if self.shape == "one_cycle":
            start = 0.04 if self.start is None else self.start
        levels = Levels(start, 1.0, self.decay_to)
        self.schedule = lay_out(self, levels, run_length, count_from_one=True)
        return self.schedule

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Make the schedule for the run's length, or report why it does not fit."""
        try:
            self.prepare(run.settings.length)
        except ValueError as error:
            raise SettingsError(f"{run.name_of(self)}.{error}") from error

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Refuse lengths in epochs if the data has no epochs."""
        if self.schedule.unit == "epochs" and run.progress.epoch_samples is None:
            raise SettingsError(
                f"{run.name_of(self)}: its lengths are in epochs, but the data source has no epochs"
            )

    @hookimpl
    def lr_factor(self, run: Run) -> float:
        """Return the factor of the learning rate at the run's progress."""
        schedule = self.schedule
        return schedule.value(schedule.position(run.progress))
