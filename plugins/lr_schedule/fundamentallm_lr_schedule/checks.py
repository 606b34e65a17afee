"""Check the settings of a schedule that do not depend on the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fundamentallm import Period

if TYPE_CHECKING:
    from fundamentallm_lr_schedule.segments import ScheduleSettings

# The settings that belong to one shape only, and the settings that a shape requires.
_OWNERS = {
    "decay": "wsd",
    "decay_shape": "wsd",
    "cycle": "cosine_with_restarts",
    "cycle_growth": "cosine_with_restarts",
    "power": "polynomial",
    "at": "step",
    "gamma": "step",
}
_NEEDS = {
    "wsd": ("decay",),
    "cosine_with_restarts": ("cycle",),
    "polynomial": ("power",),
    "one_cycle": ("warmup",),
    "inverse_sqrt": ("warmup",),
    "step": ("at", "gamma"),
}


def check_settings(settings: ScheduleSettings) -> None:
    """Raise ``ValueError`` (``field: what is wrong``) for settings that do not fit the shape."""
    for name, owner in _OWNERS.items():
        if getattr(settings, name) is not None:
            check_owner(owner, settings, name)
    for name in _NEEDS.get(settings.shape, ()):
        if not getattr(settings, name):
            raise ValueError(f"{name}: is missing; shape {settings.shape!r} needs it")
    for name in ("warmup", "length", "decay", "cycle", "at"):
        value = getattr(settings, name)
        for one in value if isinstance(value, list) else [value]:
            _check_fraction(name, one)


def check_owner(owner: str, settings: ScheduleSettings, name: str) -> None:
    """Raise ``ValueError`` if a setting of one shape is set for another shape."""
    if settings.shape != owner:
        raise ValueError(f"{name}: belongs to shape {owner!r}, but shape is {settings.shape!r}")


def _check_fraction(name: str, value: Period | float | None) -> None:
    lowest = 0 if name == "warmup" else 1e-300
    if not isinstance(value, Period | None) and not lowest <= value <= 1:
        raise ValueError(
            f"{name}: a fraction of the run is more than 0 and at most 1, got {value:g}; "
            f"for a number of steps write it without a point"
        )
