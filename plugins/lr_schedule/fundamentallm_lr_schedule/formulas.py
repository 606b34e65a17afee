"""The formulas of schedules: values between ``begin`` and ``end``.

Each is a function of ``x``, the position in its segment of the run: 0 at its start and 1 at its
end, unless stated otherwise. For a learning rate, values are factors of the optimizer's.
"""

from __future__ import annotations

import math


def constant(x: float, value: float) -> float:
    """Return ``value`` everywhere."""
    return value


def linear(x: float, begin: float, end: float) -> float:
    """Interpolate linearly (for a warmup: Goyal et al., 2017, arXiv:1706.02677, section 2.2)."""
    return begin + (end - begin) * x


def cosine(x: float, begin: float, end: float) -> float:
    """Follow half a cosine: Loshchilov and Hutter, "SGDR" (2017, arXiv:1608.03983), equation 5,
    without restarts."""
    return end + (begin - end) * (1 + math.cos(math.pi * x)) / 2


def restarts(x: float, growth: float, begin: float, end: float) -> float:
    """Restart the cosine at the end of each cycle: "SGDR" (2017, arXiv:1608.03983), equation 5.

    ``x`` is in units of the first cycle and may exceed 1. Each cycle is ``growth`` (>= 1) times as
    long as the previous one.
    """
    if growth == 1:
        return cosine(x % 1.0, begin, end)
    # By addition: with logarithms, rounding puts some restarts into the previous cycle.
    start, span = 0.0, 1.0
    while x >= start + span:
        start += span
        span *= growth
    return cosine((x - start) / span, begin, end)


def square_root(x: float, begin: float, end: float) -> float:
    """Follow 1 - sqrt(x): Hägele et al., 2024, arXiv:2405.18392."""
    return begin - (begin - end) * math.sqrt(x)


def polynomial(x: float, power: float, begin: float, end: float) -> float:
    """Follow (1 - x) ** power."""
    return end + (begin - end) * math.pow(1 - x, power)


def inverse_sqrt(x: float, begin: float, end: float) -> float:
    """Approach ``end`` as 1 / sqrt(x): Vaswani et al., 2017, arXiv:1706.03762, equation 3.

    ``x`` is the position divided by the position of the end of the warmup, so at least 1.
    """
    return end + (begin - end) / math.sqrt(x)


def stairs(x: float, gamma: float, begin: float) -> float:
    """Multiply by ``gamma`` each time that ``x`` has increased by 1."""
    return begin * math.pow(gamma, x // 1)
