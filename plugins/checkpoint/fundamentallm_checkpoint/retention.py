"""Which checkpoints may go. A pure function of what is there: nothing needs to be remembered."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fundamentallm_checkpoint.manifest import Manifest

MILESTONE, BEST, FINAL = "milestone", "best", "final"
_ALWAYS = 2


@attrs.frozen(kw_only=True)
class Rules:
    """What is to stay: the newest ones, the best ones by a metric, and all milestones."""

    keep_last: int
    keep_best: int = 0
    monitor: str = ""
    mode: Literal["min", "max"] = "min"


def plan(existing: Iterable[Manifest], rules: Rules) -> set[int]:
    """Return the steps of the sound checkpoints that may be deleted.

    The last two always stay, and so does the newest that is free of NaN, whatever the rules say.
    """
    kept = sorted(existing, key=lambda m: m.step)
    stay = {m.step for m in kept[-max(rules.keep_last, _ALWAYS) :]}
    stay |= {m.step for m in [m for m in kept if m.finite][-1:]}
    stay |= {m.step for m in ranked(kept, rules)[: rules.keep_best]}
    return {m.step for m in kept if m.step not in stay and MILESTONE not in m.tags}


def ranked(existing: Iterable[Manifest], rules: Rules) -> list[Manifest]:
    """Return those that know the metric, the best first; of equals, the earlier first."""
    known = [m for m in existing if m.score(rules.monitor, rules.mode) < math.inf]
    return sorted(known, key=lambda m: (m.score(rules.monitor, rules.mode), m.step))
