"""Tables for a terminal; imported only when one is shown, because rich loads slowly."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

GAP = 2  # columns of a terminal between two of a table


def console(width: int) -> Console:
    """Return the console of the terminal, or one with lines of this width. Markup and emoji codes
    in names and values, such as ``[b]``, are printed as they are."""
    width_there = None if Console().is_terminal else width
    return Console(width=width_there, markup=False, emoji=False, highlight=False)


def show(
    screen: Console, head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()
) -> None:
    """Print a table with a head. Columns that do not fit are printed below, after the first column
    again. Columns whose names are in ``right`` are flush right."""
    widths = [max(map(cell_len, column)) for column in zip(head, *rows, strict=True)]
    for part in parts(widths, screen.width):
        made = Table(box=None, pad_edge=False, header_style="bold")
        for place in part:
            side = "right" if head[place] in right else "left"
            made.add_column(Text(head[place]), justify=side, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            made.add_row(*(row[place] for place in part))
        screen.print(made)


def parts(widths: Sequence[int], room: int) -> list[list[int]]:
    """Return the columns of each part of a table: as many as fit into ``room``, at least one after
    the first. A column has at most half of the room; longer values are folded."""
    widths = [min(width, (room - GAP) // 2) for width in widths]
    left, found = 0, []
    for place in itertools.islice(range(len(widths)), 1, None):
        left -= GAP + widths[place]
        if left < 0:
            found.append([0])
            left = room - widths[0] - GAP - widths[place]
        found[-1].append(place)
    return found or [[0]]
