"""Check numbers of the command line; let standard output accept any text."""

from __future__ import annotations

import io
import math
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click import Context, Parameter


def number(context: Context, parameter: Parameter, value: float) -> float:
    """Refuse NaN, which click's ranges accept."""
    if math.isnan(value):
        raise click.BadParameter("nan is not a number", context, parameter)
    return value


def replace_unknown_characters() -> None:
    """Print a question mark for each character that the encoding of standard output lacks, such as
    the bytes of a file name that are no text."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
