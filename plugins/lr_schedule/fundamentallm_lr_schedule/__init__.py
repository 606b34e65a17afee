"""Learning-rate schedules: a linear warmup, and then one of eight shapes."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from fundamentallm import (
    Period,
    SettingsError,
    field,
    ge,
    gt,
    hookimpl,
    le,
    optional,
    plugin,
)
from fundamentallm_lr_schedule.parts import Part, divide

if TYPE_CHECKING:
    from fundamentallm import Run

# How far a run is, in each unit. In steps only the updates that were made count.
POSITIONS: dict[str, Callable[[Any], float]] = {
    "steps": attrgetter("applied"),
    "epochs": attrgetter("epoch"),
    "tokens": attrgetter("tokens"),
    "seconds": attrgetter("seconds"),
}
# The settings of one shape alone, and what a shape cannot do without.
_OWNERS = {
    "decay": "wsd",
    "decay_shape": "wsd",
    "cycle": "cosine_with_restarts",
    "cycle_growth": "cosine_with_restarts",
    "power": "polynomial",
    "start": "one_cycle",
}
_NEEDS = {
    "wsd": "decay",
    "cosine_with_restarts": "cycle",
    "polynomial": "power",
    "one_cycle": "warmup",
    "inverse_sqrt": "warmup",
}


@plugin
class LrSchedule:
    """Let the learning rate follow a shape over the run: a pure function of the progress.

    Every length is a period (`"500 steps"`, `"1e9 tokens"`) or, as a number with a point, a
    fraction of the run (`0.1`). All lengths of a schedule are in one unit; fractions have the
    run's.
    """

    shape: Literal[
        "constant", "linear", "cosine", "cosine_with_restarts", "wsd", "inverse_sqrt",
        "polynomial", "one_cycle",
    ] = "cosine"  # fmt: skip
    """What the learning rate does after the warmup."""
    warmup: Period | float = 0.0
    """How long it rises first, in a straight line (for `one_cycle`: along a cosine)."""
    length: Period | float = 1.0
    """When the schedule ends, counted from the beginning of the run, the warmup included. From
    there on the learning rate stays where it is. No end for `constant` and `inverse_sqrt`."""
    decay_to: float = field(default=0.0, validator=[ge(0), le(1)])
    """The final learning rate as a fraction of the optimizer's: with `lr = 1e-3`, 0.1 ends at
    1e-4. Without meaning for `constant` and `inverse_sqrt`."""
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

    position: Callable[[Any], float] = field(init=False, repr=False)
    parts: list[Part] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        for name, owner in _OWNERS.items():
            if getattr(self, name) is not None and self.shape != owner:
                raise ValueError(f"{name}: belongs to shape {owner!r}, but shape is {self.shape!r}")
        needed = _NEEDS.get(self.shape)
        if needed and not getattr(self, needed):
            raise ValueError(f"{needed}: is missing; shape {self.shape!r} needs it")
        for name in ("warmup", "length", "decay", "cycle"):
            value = getattr(self, name)
            lowest = 0 if name == "warmup" else 1e-300
            if not isinstance(value, Period | None) and not lowest <= value <= 1:
                raise ValueError(
                    f"{name}: a fraction of the run is more than 0 and at most 1, got {value:g}; "
                    f"for a number of steps leave out the point"
                )

    def prepare(self, run_length: Period) -> str:
        """Lay the schedule over a run of this length; return the unit that it is counted in.

        Raises ``ValueError`` (``field: what is wrong``) if its lengths do not fit together.
        """
        unit, self.parts = divide(self, run_length)
        self.position = POSITIONS[unit]
        return unit

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Lay the schedule over the run, or tell why it does not fit."""
        name = next(name for name, listed in run.plugins.items() if listed is self)
        try:
            unit = self.prepare(run.settings.length)
        except ValueError as error:
            raise SettingsError(f"{name}.{error}") from error
        if unit == "epochs" and run.progress.epoch_samples is None:
            raise SettingsError(f"{name}: is counted in epochs, but the data source has no epochs")

    @hookimpl
    def lr_factor(self, run: Run) -> float:
        """Return the factor at where the run is."""
        position = self.position(run.progress)
        for until, origin, span, formula in self.parts:
            if position < until:
                return formula((position - origin) / span)
        return self.decay_to
