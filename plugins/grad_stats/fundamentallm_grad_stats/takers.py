"""The plugins of a run that take histograms: any that has a method ``take_histogram``."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from fundamentallm_grad_stats.norms import EDGES

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger("fundamentallm")

EXPONENTS = tuple(float(round(math.log10(edge))) for edge in EDGES)
LIMITS = (EXPONENTS[0] - 1, *EXPONENTS, EXPONENTS[-1] + 1)
"""Of the bins, as powers of ten; what lies beyond them is in the first and the last bin."""


class Takers:
    """Whoever takes histograms, until it fails to."""

    def __init__(self, plugins: Mapping[str, Any]) -> None:
        found = {name: getattr(one, "take_histogram", None) for name, one in plugins.items()}
        self._calls = {name: call for name, call in found.items() if callable(call)}

    def hand(self, name: str, step: int, counts: list[int]) -> None:
        """Hand a histogram to everyone; who raises is left out from then on, with a warning."""
        for taker, call in list(self._calls.items()):
            try:
                # Copies: nobody can change what the next one gets.
                call(name=name, step=step, edges=list(LIMITS), counts=list(counts))
            except Exception as error:
                del self._calls[taker]
                text = "%s failed to take a histogram and is given no more: %r"
                log.warning(text, taker, error, exc_info=error)
