"""The formulas of learning-rate schedules: factors of the base learning rate.

Each is a function of ``x``, how far its part of the run is: 0 where the part begins, 1 where it
ends, unless it says otherwise. ``to`` is the factor at the end.
"""

from __future__ import annotations

import math


def constant(x: float) -> float:
    """Return 1 everywhere."""
    return 1.0


def linear_rise(x: float) -> float:
    """Go from 0 to 1 in a straight line (Goyal et al., arXiv:1706.02677, section 2.2)."""
    return x


def cosine_rise(x: float, start: float) -> float:
    """Go from ``start`` to 1 along half a cosine (the first phase of ``one_cycle``)."""
    return 1 + (start - 1) * (1 + math.cos(math.pi * x)) / 2


def linear(x: float, to: float) -> float:
    """Go from 1 to ``to`` in a straight line."""
    return 1 + (to - 1) * x


def cosine(x: float, to: float) -> float:
    """Go from 1 to ``to`` along half a cosine (SGDR, Loshchilov and Hutter, arXiv:1608.03983,
    equation 5, without restarts)."""
    return to + (1 - to) * (1 + math.cos(math.pi * x)) / 2


def restarts(x: float, growth: float, to: float) -> float:
    """Start the cosine anew at the end of each cycle (SGDR, arXiv:1608.03983).

    ``x`` counts in first cycles and may exceed 1; each cycle is ``growth`` (>= 1) times as long
    as the one before it.
    """
    if growth == 1:
        return cosine(x % 1.0, to)
    # By addition: logarithms put the restarts of some growths into the cycle before.
    begin, span = 0.0, 1.0
    while x >= begin + span:
        begin += span
        span *= growth
    return cosine((x - begin) / span, to)


def square_root(x: float, to: float) -> float:
    """Go from 1 to ``to`` as 1 - sqrt(x) (Hägele et al., arXiv:2405.18392)."""
    return 1 - (1 - to) * math.sqrt(x)


def polynomial(x: float, power: float, to: float) -> float:
    """Go from 1 to ``to`` as (1 - x) ** power."""
    return to + (1 - to) * math.pow(1 - x, power)


def inverse_sqrt(x: float) -> float:
    """Fall with the square root (Vaswani et al., arXiv:1706.03762, equation 3).

    ``x`` is the position over that of the end of the warmup: 1 there, and growing.
    """
    return 1 / math.sqrt(x)
