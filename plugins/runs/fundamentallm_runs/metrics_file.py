"""The rows of a metrics file, one by one or as columns."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import attrs
import orjson

from fundamentallm import folder

PART = 1 << 16  # bytes that are parsed at once
_STEP, _TOKENS, _TIME, _METRICS = map(itemgetter, ("step", "tokens", "time", "metrics"))


@attrs.frozen
class Block:
    """The rows with the same metrics: their places among all rows, and their values, row by row."""

    places: array[int] = attrs.field(factory=lambda: array("q"))
    values: array[float] = attrs.field(factory=lambda: array("d"))


@attrs.frozen
class Columns:
    """All rows of a run as columns, with eight bytes and no Python call for each number."""

    steps: list[int] = attrs.field(factory=list)
    tokens: list[int] = attrs.field(factory=list)
    times: array[float] = attrs.field(factory=lambda: array("d"))
    _blocks: dict[tuple[str, ...], Block] = attrs.field(factory=dict)

    def add(self, row: folder.Row) -> None:
        """Append a row."""
        block = self._block(tuple(row.metrics))
        block.places.append(len(self.steps))
        block.values.extend(row.metrics.values())
        self.steps.append(row.step)
        self.tokens.append(row.tokens)
        self.times.append(row.time)

    def add_all(self, rows: list[Any]) -> None:
        """Append the rows of some lines, without a Python call per row. If one of them is not as a
        logger writes it, with finite numbers, raise an error and append none."""
        steps, tokens = list(map(_STEP, rows)), list(map(_TOKENS, rows))
        times = array("d", map(_TIME, rows))
        if {*map(type, steps), *map(type, tokens)} != {int}:
            raise TypeError("a step or a count is no integer")
        if not -folder.LATEST < min(times) <= max(times) < folder.LATEST:
            raise ValueError("a time is out of range")
        stretches = []  # consecutive rows with the same metrics
        for names, following in groupby(map(_METRICS, rows), tuple):
            metrics = list(following)
            values = array("d", chain.from_iterable(map(dict.values, metrics)))
            stretches.append((names, len(metrics), values))
        place = len(self.steps)
        for names, count, values in stretches:
            block = self._block(names)
            block.places.extend(range(place, place + count))
            block.values.extend(values)
            place += count
        self.steps.extend(steps)
        self.tokens.extend(tokens)
        self.times.extend(times)

    def _block(self, names: tuple[str, ...]) -> Block:
        block = self._blocks.get(names)
        if block is None:
            block = self._blocks[names] = Block()
        return block

    @property
    def names(self) -> set[str]:
        """The metrics that any row has."""
        return {name for names in self._blocks for name in names}

    def parts(self, metric: str) -> list[tuple[array[int], array[float]]]:
        """Return the values of ``series`` in ordered parts, which saves the time of merging."""
        return [
            (block.places, block.values[names.index(metric) :: len(names)])
            for names, block in self._blocks.items()
            if metric in names
        ]

    def series(self, metric: str) -> tuple[Sequence[int], Sequence[float]]:
        """Return the places of the rows that have a metric, in order, and its values there."""
        found = self.parts(metric)
        if len(found) == 1:
            return found[0]
        pairs = sorted(chain.from_iterable(zip(*both, strict=True) for both in found))
        return [place for place, _ in pairs], [value for _, value in pairs]


def gathered(path: Path) -> Columns:
    """Return the columns of a metrics file; skip lines that are no whole rows."""
    columns = Columns()
    if not path.exists():
        return columns
    with path.open("rb") as file:
        while lines := file.readlines(PART):
            try:
                columns.add_all(_together(lines))
            except (ArithmeticError, LookupError, TypeError, ValueError):  # then parse line by line
                for row in filter(None, map(folder.parse_row, lines)):
                    columns.add(row)
    return columns


def _together(lines: list[bytes]) -> list[Any]:
    """Parse all lines at once, which is quicker than one by one."""
    # The line ends stay: in JSON, a truncated string cannot continue after one.
    values: list[Any] = orjson.loads(b"[" + b",".join(lines) + b"]")
    if len(values) != len(lines):
        raise ValueError("a line is not one value")
    return values
