"""A schedule as a row of parts, each with a formula, in the unit that its lengths are in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from fundamentallm import Period
from fundamentallm_lr_schedule import shapes

if TYPE_CHECKING:
    from fundamentallm_lr_schedule import LrSchedule
    from fundamentallm_lr_schedule.schedules import Scheduled

    Choices: TypeAlias = LrSchedule | Scheduled

Formula: TypeAlias = Callable[[float], float]

# What each stated unit is counted in, and how much of that it is.
_UNITS = {
    "steps": ("steps", 1),
    "epochs": ("epochs", 1),
    "tokens": ("tokens", 1),
    "seconds": ("seconds", 1),
    "minutes": ("seconds", 60),
    "hours": ("seconds", 3600),
}
# How far a run is, in each unit. In steps only the updates that were made count.
POSITIONS: dict[str, Callable[[Any], float]] = {
    "steps": attrgetter("applied"),
    "epochs": attrgetter("epoch"),
    "tokens": attrgetter("tokens"),
    "seconds": attrgetter("seconds"),
}
ENDLESS = ("constant", "inverse_sqrt", "step")


class Levels(NamedTuple):
    """The values of a schedule: where the warmup begins, at its end, and at the end of all."""

    start: float
    peak: float
    end: float


class Part(NamedTuple):
    """At positions below ``until`` the value is ``formula((position - origin) / span)``."""

    until: float
    origin: float
    span: float
    formula: Formula


class Course(NamedTuple):
    """How a value goes on over the run: along ``parts``, and ``last`` after them. ``position``
    reads from a progress how far the run is, in ``unit``."""

    unit: str
    position: Callable[[Any], float]
    parts: list[Part]
    last: float

    def value(self, position: float) -> float:
        """Return the value at a position."""
        for until, origin, span, formula in self.parts:
            if position < until:
                return formula((position - origin) / span)
        return self.last


class Lengths(NamedTuple):
    """The lengths of a schedule as numbers of one ``unit``: steps, epochs, tokens or seconds.

    ``lead`` is what formulas that count updates from 1 add to a position; ``at`` are the moments of
    ``step``, or the one stride from each to the next.
    """

    unit: str
    lead: int
    length: float = inf
    warmup: float = 0.0
    decay: float = 0.0
    cycle: float = 0.0
    at: tuple[float, ...] = ()


def divide(choices: Choices, levels: Levels, run_length: Period, *, lead: bool) -> Course:
    """Lay a schedule over a run of some length.

    With ``lead``, schedules in steps count updates from 1 where the formulas of learning rates do.
    Raises ``ValueError`` (``field: what is wrong``) if the lengths are in several units, or do not
    fit into each other.
    """
    lengths = _measure(choices, run_length, lead)
    if lengths.warmup >= lengths.length:
        told = f"{lengths.warmup:g} of {lengths.length:g} {lengths.unit}"
        raise ValueError(f"warmup: takes the whole schedule ({told}); nothing is left after it")
    # Fractions that add up to 1 may exceed it by a rounding.
    if lengths.warmup + lengths.decay > lengths.length * (1 + 1e-9):
        raise ValueError("decay: begins before the warmup ends; shorten one of them")
    parts = _BY_SHAPE[choices.shape](choices, lengths, levels)
    if lengths.warmup and choices.shape != "one_cycle":
        rise = partial(shapes.linear, begin=levels.start, end=levels.peak)
        parts.insert(0, Part(lengths.warmup, -lengths.lead, lengths.warmup + lengths.lead, rise))
    return Course(lengths.unit, POSITIONS[lengths.unit], parts, levels.end)


def count(period: Period) -> tuple[str, float]:
    """Return the unit that positions are counted in for this period, and how many of it it is."""
    unit, size = _UNITS[period.unit]
    return unit, period.amount * size


def _measure(choices: Choices, run_length: Period, lead: bool) -> Lengths:
    names = ("warmup", "at") if choices.shape in ENDLESS else ("length", "warmup", "decay", "cycle")
    counted = [
        (name, *_amount(one, run_length)) for name in names for one in _stated(choices, name)
    ]
    first, unit = next(((name, unit) for name, unit, _ in counted), ("", count(run_length)[0]))
    for name, other, _ in counted:
        if other != unit:
            raise ValueError(
                f"{name}: is in {other}, but {first} is in {unit} (fractions are of the run's "
                f"{run_length}); state both in one unit"
            )
    amounts: dict[str, Any] = {name: size for name, _, size in counted if name != "at"}
    at = tuple(size for name, _, size in counted if name == "at")
    return Lengths(unit, int(lead and unit == "steps"), at=at, **amounts)


def _stated(choices: Choices, name: str) -> list[Period | float]:
    value = getattr(choices, name)
    return value if isinstance(value, list) else [value] if value else []


def _amount(stated: Period | float, run_length: Period) -> tuple[str, float]:
    if isinstance(stated, Period):
        return count(stated)
    unit, whole = count(run_length)
    # 0.07 of 100, which is 7.000000000000001 in binary, is 7.
    return unit, round(stated * whole, 9)


def _constant(_: Choices, lengths: Lengths, levels: Levels) -> list[Part]:
    return [Part(lengths.length, 0, 1, partial(shapes.constant, value=levels.peak))]


def _step(choices: Choices, lengths: Lengths, levels: Levels) -> list[Part]:
    gamma = choices.gamma or 1.0
    if not isinstance(choices.at, list):
        formula = partial(shapes.stairs, gamma=gamma, begin=levels.peak)
        stride = lengths.at[0]
        before = partial(shapes.constant, value=levels.peak)
        return [Part(stride, 0, 1, before), Part(inf, 0, stride, formula)]
    moments = enumerate([*sorted(lengths.at), inf])
    return [
        Part(until, 0, 1, partial(shapes.constant, value=levels.peak * gamma**index))
        for index, until in moments
    ]


def _inverse_sqrt(_: Choices, lengths: Lengths, levels: Levels) -> list[Part]:
    formula = partial(shapes.inverse_sqrt, begin=levels.peak, end=levels.end)
    return [Part(lengths.length, -lengths.lead, lengths.warmup + lengths.lead, formula)]


def _linear(_: Choices, lengths: Lengths, levels: Levels) -> list[Part]:
    return _rest(lengths, partial(shapes.linear, begin=levels.peak, end=levels.end))


def _cosine(_: Choices, lengths: Lengths, levels: Levels) -> list[Part]:
    return _rest(lengths, partial(shapes.cosine, begin=levels.peak, end=levels.end))


def _polynomial(choices: Choices, lengths: Lengths, levels: Levels) -> list[Part]:
    power = choices.power or 1.0
    formula = partial(shapes.polynomial, power=power, begin=levels.peak, end=levels.end)
    return _rest(lengths, formula)


def _restarts(choices: Choices, lengths: Lengths, levels: Levels) -> list[Part]:
    growth = choices.cycle_growth or 1.0
    formula = partial(shapes.restarts, growth=growth, begin=levels.peak, end=levels.end)
    return [Part(lengths.length, lengths.warmup, lengths.cycle, formula)]


def _wsd(choices: Choices, lengths: Lengths, levels: Levels) -> list[Part]:
    formulas = {"linear": shapes.linear, "cosine": shapes.cosine, "sqrt": shapes.square_root}
    chosen = formulas[choices.decay_shape or "linear"]
    begin = lengths.length - lengths.decay
    return [
        Part(begin, 0, 1, partial(shapes.constant, value=levels.peak)),
        Part(
            lengths.length, begin, lengths.decay, partial(chosen, begin=levels.peak, end=levels.end)
        ),
    ]


def _one_cycle(_: Choices, lengths: Lengths, levels: Levels) -> list[Part]:
    # With a lead the last update, not the one after it, gets the final value.
    top, end = lengths.warmup - lengths.lead, lengths.length - lengths.lead
    return [
        Part(top, 0, top, partial(shapes.cosine, begin=levels.start, end=levels.peak)),
        Part(end, top, end - top, partial(shapes.cosine, begin=levels.peak, end=levels.end)),
    ]


def _rest(lengths: Lengths, formula: Formula) -> list[Part]:
    return [Part(lengths.length, lengths.warmup, lengths.length - lengths.warmup, formula)]


_BY_SHAPE: dict[str, Callable[[Choices, Lengths, Levels], list[Part]]] = {
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
