"""Decide which checkpoints may be deleted: a pure function of the manifests and the rules."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fundamentallm_checkpoint.storage.manifest import Manifest

MILESTONE, BEST, FINAL = "milestone", "best", "final"

# Should the newest turn out damaged, there is one more to resume from.
_ALWAYS = 2


@attrs.frozen(kw_only=True)
class Rules:
    """What to keep: the newest ones, the best ones by a metric, and all milestones."""

    keep_last: int
    keep_best: int = 0
    monitor: str = ""
    mode: Literal["min", "max"] = "min"


def plan(existing: Iterable[Manifest], rules: Rules) -> set[int]:
    """Return the steps of the sound checkpoints that may be deleted.

    The last two always stay, and so does the newest without NaN, whatever the rules say.
    """
    ordered = sorted(existing, key=lambda m: m.step)
    stay = {m.step for m in ordered[-max(rules.keep_last, _ALWAYS) :]}
    # If the last ones hold NaN, this is the one that a run resumes from or goes back to.
    stay |= {m.step for m in [m for m in ordered if m.finite][-1:]}
    stay |= {m.step for m in ranked(ordered, rules)[: rules.keep_best]}
    return {m.step for m in ordered if m.step not in stay and MILESTONE not in m.tags}


def ranked(existing: Iterable[Manifest], rules: Rules) -> list[Manifest]:
    """Return the manifests that have the metric, the best first; of equals, the earlier first."""
    known = [m for m in existing if m.score(rules.monitor, rules.mode) < math.inf]
    return sorted(known, key=lambda m: (m.score(rules.monitor, rules.mode), m.step))


def is_among_best(candidate: Manifest, existing: Iterable[Manifest], rules: Rules) -> bool:
    """Return whether ``candidate`` is one of the ``keep_best`` best of all."""
    # A step that is repeated replaces its checkpoint, and does not compete with it.
    others = (m for m in existing if m.step != candidate.step)
    return candidate in ranked([*others, candidate], rules)[: rules.keep_best]
