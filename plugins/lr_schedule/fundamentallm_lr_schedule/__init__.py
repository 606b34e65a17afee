"""Schedules: of the learning rate, and of any other number that a plugin reads during the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fundamentallm import Period, SettingsError, field, ge, gt, hookimpl, le, optional, plugin
from fundamentallm_lr_schedule.checks import check, owned_by
from fundamentallm_lr_schedule.parts import Course, Levels, divide
from fundamentallm_lr_schedule.schedules import Scheduled, Schedules

if TYPE_CHECKING:
    from fundamentallm import Run

__all__ = ["LrSchedule", "Scheduled", "Schedules"]


@plugin
class LrSchedule:
    """Let the learning rate follow a shape over the run: a pure function of the progress.

    Every length is a period (`"500 steps"`, `"1e9 tokens"`) or, as a number with a point, a
    fraction of the run (`0.1`). All lengths of a schedule are in one unit; fractions have the
    run's.
    """

    role = "training"

    shape: Literal[
        "constant",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "wsd",
        "inverse_sqrt",
        "polynomial",
        "one_cycle",
        "step",
    ] = "cosine"
    """What the learning rate does after the warmup."""
    warmup: Period | float = 0.0
    """How long it rises first, in a straight line (for `one_cycle`: along a cosine)."""
    length: Period | float = 1.0
    """When the schedule ends, counted from the beginning of the run, the warmup included. From
    there on the learning rate stays where it is. No end for `constant`, `inverse_sqrt`, `step`."""
    decay_to: float = field(default=0.0, validator=[ge(0), le(1)])
    """The final learning rate as a fraction of the optimizer's: with `lr = 1e-3`, 0.1 ends at
    1e-4. Without meaning for `constant`, `inverse_sqrt` and `step`."""
    decay: Period | float | None = None
    """`wsd` only, required: how long the decay at the end takes."""
    decay_shape: Literal["linear", "cosine", "sqrt"] | None = None
    """`wsd` only: how it decays; `sqrt` is 1 - sqrt(x). By default linear."""
    cycle: Period | float | None = None
    """`cosine_with_restarts` only, required: the length of the first cycle."""
    cycle_growth: float | None = field(default=None, validator=optional(ge(1)))
    """`cosine_with_restarts` only: each cycle is this times as long as the one before it. By
    default 1."""
    power: float | None = field(default=None, validator=optional(gt(0)))
    """`polynomial` only, required: the power of (1 - x)."""
    start: float | None = field(default=None, validator=optional([ge(0), le(1)]))
    """`one_cycle` only: the first learning rate as a fraction of the optimizer's. By default
    0.04."""
    at: list[Period | float] | Period | float | None = None
    """`step` only, required: when the learning rate is multiplied by `gamma`, counted from the
    beginning of the run, such as `["30 epochs", "60 epochs"]`; one length in place of a list: again
    and again after so long."""
    gamma: float | None = field(default=None, validator=optional(gt(0)))
    """`step` only, required: what the learning rate is multiplied by."""

    changeable = ()

    course: Course = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        check(self)
        if self.start is not None:
            owned_by("one_cycle", self, "start")

    def prepare(self, run_length: Period) -> Course:
        """Lay the schedule over a run of this length.

        Raises ``ValueError`` (``field: what is wrong``) if its lengths do not fit together.
        """
        start = 0.0
        if self.shape == "one_cycle":
            start = 0.04 if self.start is None else self.start
        levels = Levels(start, 1.0, self.decay_to)
        self.course = divide(self, levels, run_length, lead=True)
        return self.course

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Lay the schedule over the run, or tell why it does not fit."""
        try:
            self.prepare(run.settings.length)
        except ValueError as error:
            raise SettingsError(f"{_name(run, self)}.{error}") from error

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Refuse epochs if the data has none."""
        if self.course.unit == "epochs" and run.progress.epoch_samples is None:
            raise SettingsError(
                f"{_name(run, self)}: is counted in epochs, but the data source has no epochs"
            )

    @hookimpl
    def lr_factor(self, run: Run) -> float:
        """Return the factor at where the run is."""
        course = self.course
        return course.value(course.position(run.progress))


def _name(run: Run, schedule: LrSchedule) -> str:
    return next(name for name, listed in run.plugins.items() if listed is schedule)
