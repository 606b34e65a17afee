"""What goes into the commands, and out of them."""

from __future__ import annotations

import io
import math
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click import Context, Parameter


def number(context: Context, parameter: Parameter, value: float) -> float:
    """Refuse what is in no range, and passes for being in every one."""
    if math.isnan(value):
        raise click.BadParameter("nan is not a number", context, parameter)
    return value


def take_any_text() -> None:
    """Let standard output take any text: what its encoding lacks comes out as a question mark, such
    as the bytes of a file name that are no text."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
