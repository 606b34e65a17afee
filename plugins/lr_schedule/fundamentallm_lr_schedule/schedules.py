"""Schedule settings of other plugins: batch size, weight decay and the like."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fundamentallm import Period, SettingsError, field, ge, gt, hookimpl, optional, plugin, table
from fundamentallm_lr_schedule.checks import check_settings
from fundamentallm_lr_schedule.scheduled_setting import ScheduledSetting, schedule_settings
from fundamentallm_lr_schedule.segments import ENDLESS, DecayShape, Shape

if TYPE_CHECKING:
    from fundamentallm import Run


@table
class Scheduled:
    """The schedule of one setting: from ``start``, in a warmup to ``peak``, then to ``end``.

    The shapes are those of `lr_schedule`.
    """

    shape: Shape = "linear"
    """The shape from `start`, or from `peak` after a warmup, to `end`."""
    start: float | None = None
    """The first value. By default the value in the plugin's own table."""
    end: float | None = None
    """The last value, or the limit of `inverse_sqrt`. Not for `constant` and `step`."""
    peak: float | None = None
    """The value at the end of the warmup; required with a warmup."""
    warmup: Period | float = 0.0
    """The length of the warmup from `start` to `peak`, which is linear (for `one_cycle` a
    cosine)."""
    length: Period | float = 1.0
    """The end of the schedule, counted from the start of the run, so including the warmup.
    `constant`, `inverse_sqrt` and `step` have no end."""
    # These settings repeat those of LrSchedule: each table documents its own, in its own words.
    decay: Period | float | None = None
    """`wsd` only, required: the length of the decay to `end`."""
    decay_shape: DecayShape | None = None
    """`wsd` only: the shape of the decay; `sqrt` is 1 - sqrt(x). By default linear."""
    cycle: Period | float | None = None
    """`cosine_with_restarts` only, required: the length of the first cycle."""
    cycle_growth: float | None = field(default=None, validator=optional(ge(1)))
    """`cosine_with_restarts` only: each cycle is this times as long as the previous one. By default
    1."""
    power: float | None = field(default=None, validator=optional(gt(0)))
    """`polynomial` only, required: the power of (1 - x)."""
    at: list[Period | float] | Period | float | None = None
    """`step` only, required: the positions where the value is multiplied by `gamma`, counted from
    the start of the run. One length instead of a list is a period."""
    gamma: float | None = field(default=None, validator=optional(gt(0)))
    """`step` only, required: the factor of the value, such as 2."""
    multiple_of: int | None = field(default=None, validator=optional(ge(1)))
    """For integers only: round to the nearest multiple of this, halves up. By default 1."""

    def __attrs_post_init__(self) -> None:
        check_settings(self)
        if self.shape == "constant" and not self.warmup:
            raise ValueError("warmup: is missing; without a warmup, a constant does not change")
        if self.warmup and self.peak is None:
            raise ValueError("peak: is missing; it is the value at the end of the warmup")
        if self.peak is not None and not self.warmup:
            raise ValueError("peak: needs a warmup; without one the value begins at start")
        if self.end is None and self.shape not in ("constant", "step"):
            raise ValueError(f"end: is missing; shape {self.shape!r} needs it")
        if self.end is not None and self.shape in ("constant", "step"):
            raise ValueError(f"end: has no meaning for shape {self.shape!r}")
        if self.length != 1.0 and self.shape in ENDLESS:
            raise ValueError(f"length: has no meaning for shape {self.shape!r}")


@plugin
class Schedules:
    """Change settings of other plugins during the run by schedules.

    Each value is a pure function of the run's progress, so a resumed run continues exactly.
    """

    role = "training"
    of: dict[str, dict[str, Scheduled]]
    """The schedules by plugin and setting: `[schedules.of.text.batch_size]`."""

    produces = ("schedules/*",)
    changeable = ()

    scheduled_settings: list[ScheduledSetting] = field(init=False, repr=False, factory=list)

    def __attrs_post_init__(self) -> None:
        if not any(self.of.values()):
            raise ValueError("of: is empty; name a plugin and its setting")

    @property
    def before(self) -> tuple[str, ...]:
        """The plugins whose settings change: their on_step_start runs after this plugin's."""
        return tuple(self.of)

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Prepare the schedules, and report every setting and value that does not fit."""
        self.scheduled_settings = schedule_settings(self, run)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Set the values for the step that the run starts from."""
        problems = [text for one in self.scheduled_settings for text in one.bind(run)]
        if problems:
            raise SettingsError(problems)
        for one in self.scheduled_settings:
            one.update(run)

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        """Set and log the values of the next step; reopen the data if they change its batches."""
        reopen = False
        for one in self.scheduled_settings:
            changed = one.update(run)
            reopen = reopen or (changed and one.cuts_data)
            run.log(one.metric, one.value)
        if reopen:
            run.reopen_data()
