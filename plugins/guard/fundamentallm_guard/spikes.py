"""What a loss spike is, and where it began: from the losses of the updates before it."""

from __future__ import annotations

FLAT = 1e-3
"""The spread of losses is taken to be at least this times their median, so that a loss which has
stood still may move."""


def limit(losses: list[float], threshold: float) -> float:
    """Return the loss above which there is a spike: median + ``threshold`` * MAD.

    MAD is the median of the absolute deviations from the median. Neither notices what less than
    half of the losses are, so that a spike among them does not hide the next one (Hampel, "The
    influence curve and its role in robust estimation", 1974).
    """
    center = median(losses)
    spread = median([abs(loss - center) for loss in losses])
    return center + threshold * max(spread, FLAT * abs(center))


def median(values: list[float]) -> float:
    """Return the middle of ``values``, which are at least one; of two middles their mean."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def onset(steps: list[int], losses: list[float], threshold: float, step: int) -> int:
    """Return the step at which what shows at ``step`` began: the first of the unbroken row of
    updates before it whose losses are beyond half of the threshold, or ``step`` itself.

    ``losses`` are those of the updates ``steps``, in their order.
    """
    raised = limit(losses, threshold / 2) if losses else 0.0
    first = step
    for before, loss in zip(reversed(steps), reversed(losses), strict=True):
        if loss <= raised:
            break
        first = before
    return first
