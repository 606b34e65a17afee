"""Tables as a terminal shows them; imported when there is one to show, since rich is not light."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text


def table(*columns: str) -> Table:
    """Return an empty table of these columns."""
    found = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        add_column(found, name)
    return found


def add_column(made: Table, name: str, justify: Literal["left", "right"] = "left") -> None:
    """Append a column to a table; its name is shown as it is, brackets and all."""
    made.add_column(Text(name), justify=justify)


def console(width: int) -> Console:
    """Return where to print: the terminal, or else lines of this width. Names and values are shown
    as they are: a ``[b]`` or ``:smile:`` in them means nothing."""
    width_there = None if Console().is_terminal else width
    return Console(width=width_there, markup=False, emoji=False, highlight=False)
