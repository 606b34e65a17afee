"""How often, and how long: ``500``, ``"2 epochs"``, ``"1e9 tokens"``, ``"10 minutes"``."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import attrs

from fundamentallm.errors import SettingsError
from fundamentallm.host.mistakes import WrongForm

if TYPE_CHECKING:
    from fundamentallm.data import Progress

_COUNTS = {"steps": "step", "epochs": "samples", "tokens": "tokens"}
_BEFORE = {"epochs": 0, "tokens": 1}  # the index in Progress.before; that of the seconds is 2
_SECONDS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
_FORM = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([a-z]+?)s?\s*")


def round_up(count: float) -> int:
    """Return the smallest whole number that is not below ``count``, apart from rounding errors.

    0.07 * 100 is 7.000000000000001 in binary; this returns 7.
    """
    return math.ceil(count * (1 - 1e-12))


@attrs.frozen
class Period:
    """An amount of steps, epochs, tokens or time; always more than zero.

    Its answers depend on the counts before and after the last step alone: nothing of a period
    needs a checkpoint, and a resumed run keeps the rhythm of the original.
    """

    amount: float
    unit: str = "steps"

    def __attrs_post_init__(self) -> None:
        if not 0 < self.amount < float("inf"):
            raise ValueError(f"a period is finite and more than zero, not {self.amount:g}")
        if self.unit in ("steps", "tokens") and self.amount != int(self.amount):
            raise ValueError(f"a number of {self.unit} is whole, not {self.amount:g}")

    @classmethod
    def parse(cls, value: object) -> Period:
        """Read ``500`` or ``"500 steps"``; raise ``ValueError`` saying what a period looks like."""
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(value)
        found = _FORM.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            raise WrongForm("a period such as 500 or '10 minutes'", value)
        unit, known = found[2] + "s", (*_COUNTS, *_SECONDS)
        if unit not in known:
            raise ValueError(f"unknown unit {unit!r}; known: {', '.join(known)}")
        return cls(float(found[1].replace("_", "")), unit)

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} {self.unit[:-1] if amount == 1 else self.unit}"

    @property
    def seconds(self) -> float | None:
        """The period in seconds; None if it is not one of time."""
        return self.amount * _SECONDS[self.unit] if self.unit in _SECONDS else None

    def done(self, progress: Progress) -> float:
        """How often the period has passed since step 0; 0.5 is halfway through the first."""
        return self._count(progress) / self._size(progress)

    def due(self, progress: Progress) -> bool:
        """Whether the last step completed a period. ``"10 minutes"`` counts training time."""
        if self.unit == "steps":  # asked after every step by every saver: worth a short cut
            return progress.step > 0 and not progress.step % self.amount
        size = self._size(progress)
        # A step seldom ends exactly at a multiple: compare whole periods, not remainders.
        before = progress.before[_BEFORE.get(self.unit, 2)]
        return self._count(progress) // size > before // size

    def reached(self, progress: Progress) -> bool:
        """Whether a run of this length is over."""
        if self.unit == "steps":
            return progress.step >= self.amount
        return self._count(progress) >= self._size(progress)

    def _count(self, progress: Progress) -> float:
        return float(getattr(progress, _COUNTS.get(self.unit, "seconds")))

    def _size(self, progress: Progress) -> float:
        if self.unit != "epochs":
            return self.amount * _SECONDS.get(self.unit, 1)
        if not progress.epoch_samples:
            raise SettingsError(f"a period of {self} needs data with epochs, which this has not")
        # Whole samples: 0.1 epochs of 1,005 samples is 101 of them, at every rank and resume.
        return round_up(self.amount * progress.epoch_samples)
