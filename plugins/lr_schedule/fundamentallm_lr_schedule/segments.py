"""A schedule as consecutive segments, each with a formula, in the unit of its lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from fundamentallm import Period
from fundamentallm_lr_schedule import formulas

if TYPE_CHECKING:
    from fundamentallm_lr_schedule import LrSchedule
    from fundamentallm_lr_schedule.schedules import Scheduled

    ScheduleSettings: TypeAlias = LrSchedule | Scheduled

Formula: TypeAlias = Callable[[float], float]

# Each unit of a period, with the unit of positions and the size in it.
_UNITS = {
    "steps": ("steps", 1),
    "epochs": ("epochs", 1),
    "tokens": ("tokens", 1),
    "seconds": ("seconds", 1),
    "minutes": ("seconds", 60),
    "hours": ("seconds", 3600),
}
# The position of a run in each unit. In steps only applied updates count.
POSITIONS: dict[str, Callable[[Any], float]] = {
    "steps": attrgetter("applied"),
    "epochs": attrgetter("epoch"),
    "tokens": attrgetter("tokens"),
    "seconds": attrgetter("seconds"),
}
Shape: TypeAlias = Literal[
    "constant",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "wsd",
    "inverse_sqrt",
    "polynomial",
    "one_cycle",
    "step",
]
DecayShape: TypeAlias = Literal["linear", "cosine", "sqrt"]
ENDLESS = ("constant", "inverse_sqrt", "step")


class Levels(NamedTuple):
    """The values of a schedule: at the start and end of the warmup, and at the end."""

    start: float
    peak: float
    end: float


class Segment(NamedTuple):
    """At positions below ``until`` the value is ``formula((position - origin) / span)``."""

    until: float
    origin: float
    span: float
    formula: Formula


class PiecewiseSchedule(NamedTuple):
    """A value as a function of the position: along ``segments``, and ``last`` after them.

    ``position`` returns the position of a ``Progress`` in ``unit``.
    """

    unit: str
    position: Callable[[Any], float]
    segments: list[Segment]
    last: float

    def value(self, position: float) -> float:
        """Return the value at a position."""
        for until, origin, span, formula in self.segments:
            if position < until:
                return formula((position - origin) / span)
        return self.last


class Lengths(NamedTuple):
    """The lengths of a schedule as numbers of one ``unit``: steps, epochs, tokens or seconds.

    ``offset`` is added to positions in formulas that count updates from 1; ``at`` are the positions
    of ``step``, or its one period.
    """

    unit: str
    offset: int
    length: float = inf
    warmup: float = 0.0
    decay: float = 0.0
    cycle: float = 0.0
    at: tuple[float, ...] = ()


def lay_out(
    settings: ScheduleSettings, levels: Levels, run_length: Period, *, count_from_one: bool
) -> PiecewiseSchedule:
    """Return a schedule for a run of a given length.

    With ``count_from_one``, schedules in steps count updates from 1, as the published formulas of
    learning rates do. Raises ``ValueError`` (``field: what is wrong``) if the lengths are in
    several units, or are too long for each other.
    """
    lengths = _measure(settings, run_length, count_from_one)
    if lengths.warmup >= lengths.length:
        lengths_text = f"{lengths.warmup:g} of {lengths.length:g} {lengths.unit}"
        raise ValueError(
            f"warmup: takes the whole schedule ({lengths_text}); nothing is left after it"
        )
    # Fractions that add up to 1 may exceed it by a rounding error.
    if lengths.warmup + lengths.decay > lengths.length * (1 + 1e-9):
        raise ValueError("decay: begins before the warmup ends; shorten one of them")
    segments = _BY_SHAPE[settings.shape](settings, lengths, levels)
    if lengths.warmup and settings.shape != "one_cycle":
        warmup = partial(formulas.linear, begin=levels.start, end=levels.peak)
        segments.insert(
            0, Segment(lengths.warmup, -lengths.offset, lengths.warmup + lengths.offset, warmup)
        )
    return PiecewiseSchedule(lengths.unit, POSITIONS[lengths.unit], segments, levels.end)


def count_period(period: Period) -> tuple[str, float]:
    """Return the unit of positions for a period, and the period in that unit."""
    unit, size = _UNITS[period.unit]
    return unit, period.amount * size


def _measure(settings: ScheduleSettings, run_length: Period, count_from_one: bool) -> Lengths:
    names = (
        ("warmup", "at") if settings.shape in ENDLESS else ("length", "warmup", "decay", "cycle")
    )
    counted = [
        (name, *_amount(one, run_length)) for name in names for one in _stated(settings, name)
    ]
    first, unit = next(
        ((name, unit) for name, unit, _ in counted), ("", count_period(run_length)[0])
    )
    for name, other, _ in counted:
        if other != unit:
            raise ValueError(
                f"{name}: is in {other}, but {first} is in {unit} (fractions are of the run's "
                f"{run_length}); use one unit for both"
            )
    amounts: dict[str, Any] = {name: size for name, _, size in counted if name != "at"}
    at = tuple(size for name, _, size in counted if name == "at")
    return Lengths(unit, int(count_from_one and unit == "steps"), at=at, **amounts)


def _stated(settings: ScheduleSettings, name: str) -> list[Period | float]:
    value = getattr(settings, name)
    return value if isinstance(value, list) else [value] if value else []


def _amount(stated: Period | float, run_length: Period) -> tuple[str, float]:
    if isinstance(stated, Period):
        return count_period(stated)
    unit, whole = count_period(run_length)
    # 0.07 x 100 is 7.000000000000001 in binary, and should be 7.
    return unit, round(stated * whole, 9)


def _constant(_: ScheduleSettings, lengths: Lengths, levels: Levels) -> list[Segment]:
    return [Segment(lengths.length, 0, 1, partial(formulas.constant, value=levels.peak))]


def _step(settings: ScheduleSettings, lengths: Lengths, levels: Levels) -> list[Segment]:
    gamma = settings.gamma or 1.0
    if not isinstance(settings.at, list):
        formula = partial(formulas.stairs, gamma=gamma, begin=levels.peak)
        period = lengths.at[0]
        before = partial(formulas.constant, value=levels.peak)
        return [Segment(period, 0, 1, before), Segment(inf, 0, period, formula)]
    positions = enumerate([*sorted(lengths.at), inf])
    return [
        Segment(until, 0, 1, partial(formulas.constant, value=levels.peak * gamma**index))
        for index, until in positions
    ]


def _inverse_sqrt(_: ScheduleSettings, lengths: Lengths, levels: Levels) -> list[Segment]:
    formula = partial(formulas.inverse_sqrt, begin=levels.peak, end=levels.end)
    return [Segment(lengths.length, -lengths.offset, lengths.warmup + lengths.offset, formula)]


def _linear(_: ScheduleSettings, lengths: Lengths, levels: Levels) -> list[Segment]:
    return _after_warmup(lengths, partial(formulas.linear, begin=levels.peak, end=levels.end))


def _cosine(_: ScheduleSettings, lengths: Lengths, levels: Levels) -> list[Segment]:
    return _after_warmup(lengths, partial(formulas.cosine, begin=levels.peak, end=levels.end))


def _polynomial(settings: ScheduleSettings, lengths: Lengths, levels: Levels) -> list[Segment]:
    power = settings.power or 1.0
    formula = partial(formulas.polynomial, power=power, begin=levels.peak, end=levels.end)
    return _after_warmup(lengths, formula)


def _restarts(settings: ScheduleSettings, lengths: Lengths, levels: Levels) -> list[Segment]:
    growth = settings.cycle_growth or 1.0
    formula = partial(formulas.restarts, growth=growth, begin=levels.peak, end=levels.end)
    return [Segment(lengths.length, lengths.warmup, lengths.cycle, formula)]


def _wsd(settings: ScheduleSettings, lengths: Lengths, levels: Levels) -> list[Segment]:
    decays = {"linear": formulas.linear, "cosine": formulas.cosine, "sqrt": formulas.square_root}
    chosen = decays[settings.decay_shape or "linear"]
    begin = lengths.length - lengths.decay
    return [
        Segment(begin, 0, 1, partial(formulas.constant, value=levels.peak)),
        Segment(
            lengths.length, begin, lengths.decay, partial(chosen, begin=levels.peak, end=levels.end)
        ),
    ]


def _one_cycle(_: ScheduleSettings, lengths: Lengths, levels: Levels) -> list[Segment]:
    # With an offset the last update gets the final value, not the update after it.
    top, end = lengths.warmup - lengths.offset, lengths.length - lengths.offset
    return [
        Segment(top, 0, top, partial(formulas.cosine, begin=levels.start, end=levels.peak)),
        Segment(end, top, end - top, partial(formulas.cosine, begin=levels.peak, end=levels.end)),
    ]


def _after_warmup(lengths: Lengths, formula: Formula) -> list[Segment]:
    return [Segment(lengths.length, lengths.warmup, lengths.length - lengths.warmup, formula)]


_BY_SHAPE: dict[str, Callable[[ScheduleSettings, Lengths, Levels], list[Segment]]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _restarts,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "polynomial": _polynomial,
    "one_cycle": _one_cycle,
    "step": _step,
}
