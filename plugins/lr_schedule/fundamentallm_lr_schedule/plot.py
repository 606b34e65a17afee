"""Draw a curve of learning rates as text for a terminal, or as an image."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from fundamentallm import SettingsError, StorageError

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm_lr_schedule.curve import Curve

# A braille character has two columns of four dots. These are the bits of each column from the top.
_BRAILLE = 0x2800
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def text(curve: Curve, width: int = 64, height: int = 16) -> str:
    """Draw the curve in ``height`` lines of ``width`` characters, between its axes."""
    top = max(curve.rates)
    label = f"{top:.2e}" if curve.absolute else f"{top:g}"
    margin = len(label)
    lines = _canvas(curve, width, height)
    rows = [f"{label if i == 0 else '':>{margin}} │{line}" for i, line in enumerate(lines)]
    end = f"{curve.end:g} {curve.unit}"
    return "\n".join(
        [
            *rows,
            f"{'0':>{margin}} └{'─' * width}",
            f"{'':>{margin}}  0{end:>{width - 1}}",
            summary(curve),
        ]
    )


def summary(curve: Curve) -> str:
    """Return a line with the first, the highest and the last learning rate."""
    highest = max(range(len(curve.rates)), key=curve.rates.__getitem__)
    position = curve.positions[highest]
    where = f"update {position}" if curve.unit == "steps" else f"{position:g} {curve.unit}"
    name = "learning rate" if curve.absolute else "factor of the learning rate"
    first, top, last = (f"{curve.rates[at]:.3g}" for at in (0, highest, -1))
    return f"{name}: first {first}, highest {top} at {where}, last {last}"


def write_png(curve: Curve, path: Path, title: str) -> None:
    """Write the curve as a PNG image.

    Raises ``SettingsError`` without matplotlib, ``StorageError`` if the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingsError(
            "--png needs matplotlib, which is not installed; "
            "install it with: pip install 'fundamentallm-lr-schedule[png]'"
        ) from error
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(curve.positions, curve.rates)
    axes.set_title(title)
    axes.set_xlabel(curve.unit)
    axes.set_ylabel("learning rate" if curve.absolute else "factor of the learning rate")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def _canvas(curve: Curve, width: int, height: int) -> list[str]:
    columns, top = 2 * width, max(curve.rates) or 1.0
    places = (curve.end * column / columns for column in range(columns))
    picked = [curve.rates[bisect_right(curve.positions, place) - 1] for place in places]
    levels = [round(rate / top * (4 * height - 1)) for rate in picked]
    cells = [[_BRAILLE] * width for _ in range(height)]
    for column, level in enumerate(levels):
        before = levels[column - 1] if column else level
        # From the previous level to this one, so that a steep line has no gaps.
        for dot in range(min(level, before), max(level, before) + 1):
            row, quarter = divmod(4 * height - 1 - dot, 4)
            cells[row][column // 2] |= _DOTS[column % 2][quarter]
    return ["".join(map(chr, line)) for line in cells]
