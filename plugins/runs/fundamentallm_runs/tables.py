"""Tables as a terminal shows them; imported when there is one to show, since rich is not light."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def table(*columns: str) -> Table:
    """Return an empty table of these columns."""
    return Table(*columns, box=None, pad_edge=False, header_style="bold")


def console(width: int) -> Console:
    """Return where to print: the terminal, or else lines of this width."""
    return Console(width=None if Console().is_terminal else width)
