"""Detect loss spikes and where they began, from the losses of earlier updates."""

from __future__ import annotations

from statistics import median

FLAT = 1e-3
"""Smallest spread of the losses, as a fraction of their median: a loss that has been constant may
still move by this much."""


def limit(losses: list[float], threshold: float) -> float:
    """Return the loss above which a step is a spike: median + ``threshold`` * MAD.

    MAD is the median of the absolute deviations from the median. Outliers that are less than half
    of the losses move neither, so one spike does not hide the next (Hampel, "The influence curve
    and its role in robust estimation", 1974).
    """
    center = median(losses)
    spread = median([abs(loss - center) for loss in losses])
    return center + threshold * max(spread, FLAT * abs(center))


def onset(steps: list[int], losses: list[float], threshold: float, step: int) -> int:
    """Return the step at which the fault of ``step`` began.

    That is the first of the consecutive updates just before it whose losses are above the limit for
    half of the threshold, or ``step`` itself. ``losses`` are those of the updates ``steps``, in
    their order.
    """
    raised = limit(losses, threshold / 2) if losses else 0.0
    first = step
    for before, loss in zip(reversed(steps), reversed(losses), strict=True):
        if loss <= raised:
            break
        first = before
    return first
