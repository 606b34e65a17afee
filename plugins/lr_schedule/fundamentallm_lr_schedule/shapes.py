"""The formulas of schedules: values between ``begin`` and ``end``.

Each is a function of ``x``, how far its part of the run is: 0 where the part begins, 1 where it
ends, unless it says otherwise. For a learning rate, values are factors of the optimizer's.
"""

from __future__ import annotations

import math


def constant(x: float, value: float) -> float:
    """Stay at ``value``."""
    return value


def linear(x: float, begin: float, end: float) -> float:
    """Go in a straight line (for a warmup: Goyal et al., arXiv:1706.02677, section 2.2)."""
    return begin + (end - begin) * x


def cosine(x: float, begin: float, end: float) -> float:
    """Go along half a cosine (SGDR, Loshchilov and Hutter, arXiv:1608.03983, equation 5, without
    restarts)."""
    return end + (begin - end) * (1 + math.cos(math.pi * x)) / 2


def restarts(x: float, growth: float, begin: float, end: float) -> float:
    """Start the cosine anew at the end of each cycle (SGDR, arXiv:1608.03983).

    ``x`` counts in first cycles and may exceed 1; each cycle is ``growth`` (>= 1) times as long
    as the one before it.
    """
    if growth == 1:
        return cosine(x % 1.0, begin, end)
    # By addition: logarithms put the restarts of some growths into the cycle before.
    start, span = 0.0, 1.0
    while x >= start + span:
        start += span
        span *= growth
    return cosine((x - start) / span, begin, end)


def square_root(x: float, begin: float, end: float) -> float:
    """Go as 1 - sqrt(x) (Hägele et al., arXiv:2405.18392)."""
    return begin - (begin - end) * math.sqrt(x)


def polynomial(x: float, power: float, begin: float, end: float) -> float:
    """Go as (1 - x) ** power."""
    return end + (begin - end) * math.pow(1 - x, power)


def inverse_sqrt(x: float, begin: float, end: float) -> float:
    """Approach ``end`` as 1 / sqrt(x) (Vaswani et al., arXiv:1706.03762, equation 3).

    ``x`` is the position over that of the end of the warmup: 1 there, and growing.
    """
    return end + (begin - end) / math.sqrt(x)


def stairs(x: float, gamma: float, begin: float) -> float:
    """Multiply by ``gamma`` whenever ``x`` has grown by 1."""
    return begin * math.pow(gamma, x // 1)
