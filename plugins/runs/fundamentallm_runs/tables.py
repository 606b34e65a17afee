"""Tables as a terminal shows them; imported when there is one to show, since rich is not light."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

GAP = 2  # columns of a terminal between two of a table


def console(width: int) -> Console:
    """Return where to print: the terminal, or else lines of this width. Names and values are shown
    as they are: a ``[b]`` or ``:smile:`` in them means nothing."""
    width_there = None if Console().is_terminal else width
    return Console(width=width_there, markup=False, emoji=False, highlight=False)


def show(
    screen: Console, head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] = ()
) -> None:
    """Print a table with a head. The columns that do not fit beside the others follow below, each
    time behind the first one again; those whose names are in ``right`` are flush right."""
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
    """Return the places of the columns of each part of a table: as many as there is room for, at
    least one beside the first. A column may take half of the room, and is folded."""
    widths = [min(width, (room - GAP) // 2) for width in widths]
    left, found = 0, []
    for place in itertools.islice(range(len(widths)), 1, None):
        left -= GAP + widths[place]
        if left < 0:
            found.append([0])
            left = room - widths[0] - GAP - widths[place]
        found[-1].append(place)
    return found or [[0]]
