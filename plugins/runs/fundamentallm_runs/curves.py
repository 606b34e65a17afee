"""Curves of several runs in one picture: in the terminal, or as PNG, SVG or HTML."""

from __future__ import annotations

import html
import io
import itertools
import math
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import attrs

from fundamentallm import SettingsError, StorageError
from fundamentallm_runs.run_record import Record

Axis: TypeAlias = Literal["step", "tokens", "time"]
AXES = ("step", "tokens", "time")
LABELS = {"step": "step", "tokens": "tokens", "time": "seconds since the first row"}
POINTS = 2000  # more than a picture has columns would only take time
SIZE = (96, 24)  # of a drawing, in columns and lines
LARGEST = 1e300  # largest value that is drawn: the length of an axis must be finite, too
LEGEND = 8  # largest number of curves in the legend of a drawing
MARKS = "1234567890" + string.ascii_letters
SUFFIXES = (".png", ".svg", ".html")


@attrs.frozen
class Curve:
    """The values of one metric in one run."""

    name: str
    x: list[float]
    y: list[float]


def curve(record: Record, metric: str, axis: Axis, smoothing: float) -> Curve | None:
    """Return the curve of a metric's finite values, or None if the run has none.

    ``smoothing``, from 0 to below 1, is the weight of what came before in an exponential moving
    average whose start is corrected (Kingma and Ba, *Adam*, 2015, section 3).
    """
    columns = record.columns
    places, values = drawable(*columns.series(metric))
    if not values:
        return None
    y = smoothed(values, smoothing)
    kept = extremes(y, POINTS)
    if axis == "time":
        x = [columns.times[places[i]] - columns.times[0] for i in kept]
    else:
        numbers = columns.steps if axis == "step" else columns.tokens
        x = [float(numbers[places[i]]) for i in kept]
    return Curve(record.name, x, [y[i] for i in kept])


def drawable(
    places: Sequence[int], values: Sequence[float]
) -> tuple[Sequence[int], Sequence[float]]:
    """Return the values that are finite and not too large to draw, and their places."""
    # If the sum and the extremes are, all values are: quicker than a test per value.
    if values and math.isfinite(sum(values)) and -LARGEST < min(values) <= max(values) < LARGEST:
        return places, values
    both = [
        (place, value) for place, value in zip(places, values, strict=True) if abs(value) < LARGEST
    ]
    return [place for place, _ in both], [value for _, value in both]


def extremes(values: Sequence[float], most: int) -> list[int]:
    """Return the places of at most ``most`` + 2 values: the ends, and the lowest and the highest
    value of equal parts of the list, so that no spike is lost."""
    if len(values) <= most:
        return list(range(len(values)))
    size = -(-len(values) // (most // 2))
    kept = {0, len(values) - 1}
    for first in range(0, len(values), size):
        part = values[first : first + size]
        kept |= {first + part.index(min(part)), first + part.index(max(part))}
    return sorted(kept)


def smoothed(values: Sequence[float], weight: float) -> Sequence[float]:
    """Return the corrected exponential moving average of values."""
    if not weight:
        return values
    mean, left, found = 0.0, 1.0, []
    for value in values:
        mean = weight * mean + (1 - weight) * value
        left *= weight
        found.append(mean / (1 - left))
    return found


def drawn(curves: list[Curve], metric: str, axis: Axis, colours: bool = True) -> str:
    """Return the curves as text, in different colours; without colours, and if there are many,
    drawn of different digits and letters."""
    import plotext

    figure = plotext.figure
    figure.clear()  # there is one figure in a process
    figure.plot_size(*SIZE)
    figure.title(metric)
    figure.label(LABELS[axis], "x")
    # At the right, since losses fall from the left.
    right, top = max(max(one.x) for one in curves), max(max(one.y) for one in curves)
    figure.legend(x=right, y=top, ha="right", relative=True)
    marked = list(zip(itertools.cycle(MARKS), curves, strict=False))
    is_full = len(curves) > LEGEND
    for mark, one in marked:
        signal = figure.signal(one.x, one.y, marker=mark if is_full or not colours else None)
        signal.label(one.name)
        if len(one.x) > 1:
            signal.lines()
        figure.draw(signal)
    text = str(figure.build().string(colorless=not colours))
    legend = "  ".join(f"{mark} {one.name}" for mark, one in marked)
    return f"{text.rstrip()}\n{legend}\n" if is_full else text


def check_form(path: Path) -> None:
    """Raise a ``SettingsError`` unless the suffix of a picture's name is a known form."""
    if path.suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise SettingsError(f"{path}: unknown form {path.suffix!r} of a picture; known: {known}")


def write(path: Path, curves: list[Curve], metric: str, axis: Axis) -> None:
    """Write the curves to a picture in the form of its suffix."""
    check_form(path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        wanted = "pip install 'fundamentallm-runs[pictures]'"
        raise SettingsError(f"{path}: pictures need matplotlib: {wanted}") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lines = [axes.plot(one.x, one.y, linewidth=1.2)[0] for one in curves]
    axes.set(xlabel=LABELS[axis], ylabel=_literal(metric))
    axes.grid(alpha=0.3)
    axes.legend(lines, [_literal(one.name) for one in curves])  # also names with an underscore
    made = io.BytesIO()
    figure.savefig(made, format="png" if path.suffix == ".png" else "svg", dpi=150)
    data = made.getvalue() if path.suffix != ".html" else page(made.getvalue(), metric)
    try:
        path.write_bytes(data)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error


def _literal(text: str) -> str:
    """Return text without formulas: matplotlib reads text between two ``$`` as one."""
    return text.replace("$", r"\$")


def page(picture: bytes, title: str) -> bytes:
    """Return a page of HTML around an SVG picture."""
    _, tag, rest = picture.decode("utf-8").partition("<svg")
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return (head + tag + rest).encode()
