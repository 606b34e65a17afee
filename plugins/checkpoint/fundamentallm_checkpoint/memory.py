"""How much memory there is: a file of holes can tell of any amount, and have it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import attrs

_FACTS = Path("/proc/meminfo")
# Of the group of processes, for both kinds of groups; seen from within a container, it is its own.
_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@attrs.frozen
class Room:
    """Bytes of memory, swap included: all that there is, and what is free or can be made so."""

    all: int
    free: int


def room() -> Room | None:
    """Return the room that this process has, or None where the system does not tell."""
    try:
        lines = [line.split() for line in _FACTS.read_text().splitlines()]
        known = {line[0]: 1024 * int(line[1]) for line in lines}
        found = (
            known["MemTotal:"] + known["SwapTotal:"],
            known["MemAvailable:"] + known["SwapFree:"],
        )
    except (OSError, LookupError, ValueError):
        return None
    limits = []
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            limits.append(int(path.read_text()))
    return Room(*(min(size, *limits) if limits else size for size in found))


def check(size: int) -> None:
    """Raise ``ValueError`` if a file tells of more than the machine could hold, and ``MemoryError``
    if there is no room for it now."""
    there = room()
    if there is None:
        return
    if size > there.all:
        raise ValueError(
            f"it tells of {size:,} bytes of tensors, more than the {there.all:,} bytes of memory"
            " that this machine has"
        )
    if size > there.free:
        raise MemoryError(
            f"holds {size:,} bytes of tensors, and {there.free:,} bytes of memory are free"
        )
