"""Plot the losses of a whole run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fundamentallm_mlflow.journal import JournalReader, Timeline

if TYPE_CHECKING:
    from pathlib import Path

MOST = 4000  # points of a curve: a plot cannot show more, and they need memory


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the points of every loss in the valid rows, at most ``MOST`` evenly spaced ones."""
    journal = folder / "journal.jsonl"
    timeline = Timeline(journal)
    found: dict[str, dict[int, float]] = {}
    for offset, row in JournalReader(journal).rows():
        if row["kind"] == "metrics" and timeline.is_valid(offset, row["step"]):
            for key, value in row["metrics"].items():
                if key.endswith("/loss") and math.isfinite(value):
                    found.setdefault(key, {})[row["step"]] = value
    return {key: sorted(p.items())[:: len(p) // MOST + 1] for key, p in sorted(found.items())}


def draw(folder: Path) -> Path | None:
    """Plot the losses over the steps into ``loss.png``; return None if there is no loss."""
    found = curves(folder)
    if not found:
        return None
    # Not pyplot, which keeps global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, points in found.items():
        marker = "o" if len(points) < 50 else ""
        axes.plot(*zip(*points, strict=True), label=key, marker=marker, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss.png"
    figure.savefig(path, dpi=100)
    return path
