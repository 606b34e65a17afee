"""A schedule as a row of parts, each with a formula, in the unit that its lengths are in."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from fundamentallm import Period
from fundamentallm_lr_schedule import shapes

if TYPE_CHECKING:
    from fundamentallm_lr_schedule import LrSchedule

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


class Part(NamedTuple):
    """At positions below ``until`` the factor is ``formula((position - origin) / span)``."""

    until: float
    origin: float
    span: float
    formula: Formula


class Lengths(NamedTuple):
    """The lengths of a schedule as numbers of one ``unit``: steps, epochs, tokens or seconds."""

    unit: str
    length: float = inf
    warmup: float = 0.0
    decay: float = 0.0
    cycle: float = 0.0

    @property
    def lead(self) -> int:
        """What formulas that count updates from 1 add to a position: in steps, positions are
        indices of updates and begin at 0; elsewhere they are amounts."""
        return 1 if self.unit == "steps" else 0


def divide(schedule: LrSchedule, run_length: Period) -> tuple[str, list[Part]]:
    """Return the unit of the positions, and the parts of the schedule in their order.

    After the last part the factor is ``schedule.decay_to``. Raises ``ValueError`` (``field: what
    is wrong``) if the lengths are in several units, or do not fit into each other.
    """
    lengths = _measure(schedule, run_length)
    if lengths.warmup >= lengths.length:
        told = f"{lengths.warmup:g} of {lengths.length:g} {lengths.unit}"
        raise ValueError(f"warmup: takes the whole schedule ({told}); nothing is left to decay")
    # Fractions that add up to 1 may exceed it by a rounding.
    if lengths.warmup + lengths.decay > lengths.length * (1 + 1e-9):
        raise ValueError("decay: begins before the warmup ends; shorten one of them")
    if schedule.shape == "one_cycle":
        return lengths.unit, _one_cycle(schedule, lengths)
    warmup, lead = lengths.warmup, lengths.lead
    rise = [Part(warmup, -lead, warmup + lead, shapes.linear_rise)] if warmup else []
    return lengths.unit, rise + _AFTER_WARMUP[schedule.shape](schedule, lengths)


def count(period: Period) -> tuple[str, float]:
    """Return the unit that positions are counted in for this period, and how many of it it is."""
    unit, size = _UNITS[period.unit]
    return unit, period.amount * size


def _measure(schedule: LrSchedule, run_length: Period) -> Lengths:
    endless = schedule.shape in ("constant", "inverse_sqrt")
    names = ("warmup",) if endless else ("length", "warmup", "decay", "cycle")
    amounts: dict[str, float] = {}
    units: dict[str, str] = {}
    for name in names:
        stated = getattr(schedule, name)
        if stated:
            share, period = (1.0, stated) if isinstance(stated, Period) else (stated, run_length)
            units[name], whole = count(period)
            amounts[name] = share * whole
    unit = next(iter(units.values()), count(run_length)[0])
    for name, other in units.items():
        if other != unit:
            raise ValueError(
                f"{name}: is in {other}, but length is in {unit} (fractions are of the run's "
                f"{run_length}); state both in one unit"
            )
    return Lengths(unit, **amounts)


def _constant(_: LrSchedule, lengths: Lengths) -> list[Part]:
    return [Part(lengths.length, 0, 1, shapes.constant)]


def _inverse_sqrt(_: LrSchedule, lengths: Lengths) -> list[Part]:
    lead = lengths.lead
    return [Part(lengths.length, -lead, lengths.warmup + lead, shapes.inverse_sqrt)]


def _linear(schedule: LrSchedule, lengths: Lengths) -> list[Part]:
    return _fall(lengths, partial(shapes.linear, to=schedule.decay_to))


def _cosine(schedule: LrSchedule, lengths: Lengths) -> list[Part]:
    return _fall(lengths, partial(shapes.cosine, to=schedule.decay_to))


def _polynomial(schedule: LrSchedule, lengths: Lengths) -> list[Part]:
    assert schedule.power is not None  # the plugin checked it
    formula = partial(shapes.polynomial, power=schedule.power, to=schedule.decay_to)
    return _fall(lengths, formula)


def _restarts(schedule: LrSchedule, lengths: Lengths) -> list[Part]:
    growth = schedule.cycle_growth or 1.0
    formula = partial(shapes.restarts, growth=growth, to=schedule.decay_to)
    return [Part(lengths.length, lengths.warmup, lengths.cycle, formula)]


def _wsd(schedule: LrSchedule, lengths: Lengths) -> list[Part]:
    formulas = {"linear": shapes.linear, "cosine": shapes.cosine, "sqrt": shapes.square_root}
    formula = partial(formulas[schedule.decay_shape or "linear"], to=schedule.decay_to)
    begin = lengths.length - lengths.decay
    return [
        Part(begin, 0, 1, shapes.constant),
        Part(lengths.length, begin, lengths.decay, formula),
    ]


def _one_cycle(schedule: LrSchedule, lengths: Lengths) -> list[Part]:
    # Counted so that the last update, not the one after it, gets the final learning rate.
    top, end = lengths.warmup - lengths.lead, lengths.length - lengths.lead
    start = 0.04 if schedule.start is None else schedule.start
    return [
        Part(top, 0, top, partial(shapes.cosine_rise, start=start)),
        Part(end, top, end - top, partial(shapes.cosine, to=schedule.decay_to)),
    ]


def _fall(lengths: Lengths, formula: Formula) -> list[Part]:
    return [Part(lengths.length, lengths.warmup, lengths.length - lengths.warmup, formula)]


_AFTER_WARMUP: dict[str, Callable[[LrSchedule, Lengths], list[Part]]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _restarts,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "polynomial": _polynomial,
}
