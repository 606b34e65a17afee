"""The learning rate over a whole run, from the settings alone."""

from __future__ import annotations

from math import ceil, inf, prod
from typing import TYPE_CHECKING, NamedTuple

from fundamentallm import SettingsError, answering
from fundamentallm_lr_schedule import LrSchedule
from fundamentallm_lr_schedule.segments import PiecewiseSchedule, count_period

if TYPE_CHECKING:
    from fundamentallm import Composed

_POINTS = 2000


class Curve(NamedTuple):
    """Learning rates at positions from 0 to ``end`` in ``unit``.

    If not ``absolute``, they are factors of a learning rate that is unknown.
    """

    unit: str
    positions: list[float]
    rates: list[float]
    end: float
    absolute: bool


def trace_lr(composed: Composed) -> Curve:
    """Return the product of all listed schedules over the run.

    If the run's length has another unit than the schedules, the curve ends where they end. Raises
    ``SettingsError`` if there is no schedule, or if their units differ.
    """
    found = composed.plugins.items()
    schedules = {name: one for name, one in found if isinstance(one, LrSchedule)}
    if not schedules:
        raise SettingsError("no schedule to draw: lr_schedule is not in the plugins list")
    prepared = {name: _prepare(name, one, composed) for name, one in schedules.items()}
    units = {name: schedule.unit for name, schedule in prepared.items()}
    unit = next(iter(units.values()))
    if len(set(units.values())) > 1:
        each = ", ".join(f"{name} is in {of}" for name, of in units.items())
        raise SettingsError(f"schedules in several units cannot be drawn as one: {each}")
    edges = [segment.until for schedule in prepared.values() for segment in schedule.segments]
    own, length = count_period(composed.run.length)
    end = length if own == unit else _end(edges)
    base = _base(composed)
    curve = Curve(unit, _positions(end, unit, edges), [], end, absolute=base is not None)
    for position in curve.positions:
        factors = [schedule.value(position) for schedule in prepared.values()]
        curve.rates.append(prod(factors, start=1.0 if base is None else base))
    return curve


def _prepare(name: str, schedule: LrSchedule, composed: Composed) -> PiecewiseSchedule:
    try:
        return schedule.prepare(composed.run.length)
    except ValueError as error:
        raise SettingsError(f"{name}.{error}") from error


def _end(edges: list[float]) -> float:
    end = max(edge for edge in edges if edge < inf)
    # A schedule without an end is shown for twice the length of its warmup.
    return end * 2 if inf in edges else end


def _positions(end: float, unit: str, edges: list[float]) -> list[float]:
    """Return evenly spaced positions, and the ends of segments, where the extremes are."""
    if unit != "steps":
        inner = [edge for edge in edges if edge <= end]
        return sorted({*inner, *(end * index / (_POINTS - 1) for index in range(_POINTS))})
    last = int(end) - 1
    stride = max(last // _POINTS, 1)
    inner = [ceil(edge) for edge in edges if 0 <= edge <= last]
    return sorted({*range(0, last + 1, stride), *inner, last})


def _base(composed: Composed) -> float | None:
    """Return the learning rate in the settings of the optimizer's plugin, if it has one."""
    name = answering(composed.plugins, "build_optimizer")
    stated = None if name is None else getattr(composed.plugins[name], "lr", None)
    return stated if isinstance(stated, float) else None
