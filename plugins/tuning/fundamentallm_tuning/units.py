"""Numbers and lines as people read them."""

from __future__ import annotations


def line(label: str, text: str) -> str:
    """Return a line of a report: a label in a column, and a text."""
    return f"{label:<10} {text}"


def size(count: float) -> str:
    """``3 * 2**20`` -> ``3.0 MiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def duration(seconds: float) -> str:
    """``90`` -> ``1.5 minutes``."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    for unit, length, limit in (("seconds", 1, 100), ("minutes", 60, 100), ("hours", 3600, 72)):
        if seconds < limit * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def counted(count: float, noun: str, plural: str | None = None) -> str:
    """``1, "step"`` -> ``1 step``; ``1200, "step"`` -> ``1,200 steps``."""
    return f"{count:,.0f} {noun if count == 1 else plural or noun + 's'}"


def in_step(samples: int, tokens: int) -> str:
    """Return how many samples and tokens a step has."""
    return f"{counted(samples, 'sample')}, {counted(tokens, 'token')}"


def toml_float(value: float) -> str:
    """``0.00031623`` -> ``3.2e-4``, as TOML reads it."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
