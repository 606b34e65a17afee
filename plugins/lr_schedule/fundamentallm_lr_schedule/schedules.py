"""Settings of other plugins that follow a schedule: batch size, weight decay and the like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fundamentallm import Period, SettingsError, field, ge, gt, hookimpl, optional, plugin, table
from fundamentallm_lr_schedule.checks import check
from fundamentallm_lr_schedule.following import Followed, follow
from fundamentallm_lr_schedule.parts import ENDLESS

if TYPE_CHECKING:
    from fundamentallm import Run


@table
class Scheduled:
    """How one setting goes on over the run: from ``start`` (in a warmup to ``peak`` first) to
    ``end``, in one of the shapes that `lr_schedule` has for the learning rate."""

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
    ] = "linear"
    """How the value goes from `start`, or from `peak` if there is a warmup, to `end`."""
    start: float | None = None
    """The first value; by default what the plugin's own table states."""
    end: float | None = None
    """The last value; what `inverse_sqrt` approaches. Not for `constant` and `step`."""
    peak: float | None = None
    """The value at the end of the warmup; needed with one."""
    warmup: Period | float = 0.0
    """How long the value first goes from `start` to `peak`, in a straight line (for `one_cycle`:
    along a cosine)."""
    length: Period | float = 1.0
    """When the schedule ends, counted from the beginning of the run, the warmup included. No end
    for `constant`, `inverse_sqrt` and `step`."""
    decay: Period | float | None = None
    """`wsd` only, required: how long it takes at the end to get to `end`."""
    decay_shape: Literal["linear", "cosine", "sqrt"] | None = None
    """`wsd` only: how it gets there; `sqrt` is 1 - sqrt(x). By default linear."""
    cycle: Period | float | None = None
    """`cosine_with_restarts` only, required: the length of the first cycle."""
    cycle_growth: float | None = field(default=None, validator=optional(ge(1)))
    """`cosine_with_restarts` only: each cycle is this times as long as the one before it. By
    default 1."""
    power: float | None = field(default=None, validator=optional(gt(0)))
    """`polynomial` only, required: the power of (1 - x)."""
    at: list[Period | float] | Period | float | None = None
    """`step` only, required: when the value is multiplied by `gamma`, counted from the beginning of
    the run; one length in place of a list: again and again after so long."""
    gamma: float | None = field(default=None, validator=optional(gt(0)))
    """`step` only, required: what the value is multiplied by, such as 2."""
    multiple_of: int | None = field(default=None, validator=optional(ge(1)))
    """For whole numbers only: round to the nearest multiple of this, halves up. By default 1."""

    def __attrs_post_init__(self) -> None:
        check(self)
        if self.shape == "constant" and not self.warmup:
            raise ValueError("warmup: is missing; without one, a constant does not change")
        if self.warmup and self.peak is None:
            raise ValueError("peak: is missing; it is the value at the end of the warmup")
        if self.peak is not None and not self.warmup:
            raise ValueError("peak: belongs to a warmup; without one the value begins at start")
        if self.end is None and self.shape not in ("constant", "step"):
            raise ValueError(f"end: is missing; shape {self.shape!r} needs it")
        if self.end is not None and self.shape in ("constant", "step"):
            raise ValueError(f"end: has no meaning for shape {self.shape!r}")
        if self.length != 1.0 and self.shape in ENDLESS:
            raise ValueError(f"length: has no meaning for shape {self.shape!r}")


@plugin
class Schedules:
    """Let number settings of other plugins follow schedules: a pure function of the progress, so
    that a resumed run goes on exactly."""

    role = "training"

    of: dict[str, dict[str, Scheduled]]
    """The schedules by plugin and setting: `[schedules.of.text.batch_size]`."""

    produces = ("schedules/*",)
    changeable = ()

    followed: list[Followed] = field(init=False, repr=False, factory=list)

    def __attrs_post_init__(self) -> None:
        if not any(self.of.values()):
            raise ValueError("of: names no setting")

    @property
    def before(self) -> tuple[str, ...]:
        """The plugins whose settings change: a step begins for them after it has for this one."""
        return tuple(self.of)

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Lay the schedules over the run; tell every setting and value that does not fit."""
        self.followed = follow(self, run)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Set the values of where the run is."""
        problems = [text for one in self.followed for text in one.bind(run)]
        if problems:
            raise SettingsError(problems)
        for one in self.followed:
            one.update(run)

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        """Set the values of the coming step; begin the data anew where it is cut differently."""
        recut = False
        for one in self.followed:
            changed = one.update(run)
            recut = recut or (changed and one.cuts_data)
            run.log(one.metric, one.value)
        if recut:
            run.reopen_data()
