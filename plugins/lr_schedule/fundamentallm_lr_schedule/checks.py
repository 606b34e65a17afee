"""What the settings of a schedule must fulfil by themselves, whatever run they are laid over."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fundamentallm import Period

if TYPE_CHECKING:
    from fundamentallm_lr_schedule.parts import Choices

# The settings of one shape alone, and what a shape cannot do without.
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


def check(choices: Choices) -> None:
    """Raise ``ValueError`` (``field: what is wrong``) for what does not fit the shape."""
    for name, owner in _OWNERS.items():
        if getattr(choices, name) is not None:
            owned_by(owner, choices, name)
    for name in _NEEDS.get(choices.shape, ()):
        if not getattr(choices, name):
            raise ValueError(f"{name}: is missing; shape {choices.shape!r} needs it")
    for name in ("warmup", "length", "decay", "cycle", "at"):
        value = getattr(choices, name)
        for one in value if isinstance(value, list) else [value]:
            _check_fraction(name, one)


def owned_by(owner: str, choices: Choices, name: str) -> None:
    """Raise ``ValueError`` if a setting of one shape is stated for another."""
    if choices.shape != owner:
        raise ValueError(f"{name}: belongs to shape {owner!r}, but shape is {choices.shape!r}")


def _check_fraction(name: str, value: Period | float | None) -> None:
    lowest = 0 if name == "warmup" else 1e-300
    if not isinstance(value, Period | None) and not lowest <= value <= 1:
        raise ValueError(
            f"{name}: a fraction of the run is more than 0 and at most 1, got {value:g}; "
            f"for a number of steps leave out the point"
        )
