"""What the guard has against a step."""

from __future__ import annotations

from typing import Literal

import attrs

PREFIX = "guard: "


@attrs.frozen
class Fault:
    """A reason to reject a step: its kind, and what happened."""

    kind: Literal["memory", "loss", "gradient", "spike"]
    text: str

    def is_anothers(self, reasons: list[str]) -> bool:
        """Tell whether the fault is one that somebody else has rejected the step for.

        Gradients that overflow because a loss scale was too large are the business of whoever
        scales; a loss that is not finite is not.
        """
        return self.kind == "gradient" and any(not why.startswith(PREFIX) for why in reasons)
