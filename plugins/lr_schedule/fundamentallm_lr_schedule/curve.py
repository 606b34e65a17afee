"""The learning rate over a whole run, from the settings alone."""

from __future__ import annotations

from math import ceil, inf, prod
from typing import TYPE_CHECKING, NamedTuple

from fundamentallm import SettingsError
from fundamentallm_lr_schedule import LrSchedule
from fundamentallm_lr_schedule.parts import Course, count

if TYPE_CHECKING:
    from fundamentallm import Composed

_POINTS = 2000


class Curve(NamedTuple):
    """Learning rates at positions from 0 to ``end``, in one ``unit``; if not ``absolute``, as
    factors of a learning rate that is not known."""

    unit: str
    positions: list[float]
    rates: list[float]
    end: float
    absolute: bool


def trace(composed: Composed) -> Curve:
    """Follow the product of all the listed schedules through the run.

    If the run is measured in another unit than the schedules, it is followed to where they end.
    Raises ``SettingsError`` if there is no schedule, or if their units differ.
    """
    found = composed.plugins.items()
    schedules = {name: one for name, one in found if isinstance(one, LrSchedule)}
    if not schedules:
        raise SettingsError("no schedule to draw: lr_schedule is not in the plugins list")
    courses = {name: _prepare(name, one, composed) for name, one in schedules.items()}
    units = {name: course.unit for name, course in courses.items()}
    unit = next(iter(units.values()))
    if len(set(units.values())) > 1:
        each = ", ".join(f"{name} is in {of}" for name, of in units.items())
        raise SettingsError(f"schedules in several units cannot be drawn as one: {each}")
    edges = [part.until for course in courses.values() for part in course.parts]
    own, length = count(composed.run.length)
    end = length if own == unit else _end(edges)
    base = _base(composed)
    curve = Curve(unit, _positions(end, unit, edges), [], end, absolute=base is not None)
    for position in curve.positions:
        factors = [course.value(position) for course in courses.values()]
        curve.rates.append(prod(factors, start=1.0 if base is None else base))
    return curve


def _prepare(name: str, schedule: LrSchedule, composed: Composed) -> Course:
    try:
        return schedule.prepare(composed.run.length)
    except ValueError as error:
        raise SettingsError(f"{name}.{error}") from error


def _end(edges: list[float]) -> float:
    end = max(edge for edge in edges if edge < inf)
    # What has no end is shown for as long again as its warmup.
    return end * 2 if inf in edges else end


def _positions(end: float, unit: str, edges: list[float]) -> list[float]:
    """Return evenly spread positions, and the edges of parts, where the extremes are."""
    if unit != "steps":
        inner = [edge for edge in edges if edge <= end]
        return sorted({*inner, *(end * index / (_POINTS - 1) for index in range(_POINTS))})
    last = int(end) - 1
    stride = max(last // _POINTS, 1)
    inner = [ceil(edge) for edge in edges if 0 <= edge <= last]
    return sorted({*range(0, last + 1, stride), *inner, last})


def _base(composed: Composed) -> float | None:
    """Return the learning rate that the optimizer's plugin states, if it states one."""
    for one in composed.plugins.values():
        if hasattr(one, "build_optimizer"):
            stated = getattr(one, "lr", None)
            return stated if isinstance(stated, float) else None
    return None
