"""How the processes of a job ended, and which of them caused the end. Imports no torch."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable

import attrs

KILLED = 128 + signal.SIGKILL
PEER_LOST = 8
ASKED = {
    128 + number: signal.Signals(number).name
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
}
"""Exit codes of a run that a signal asked to end."""
SAME_AGAIN = {2: "settings", 3: "not finite", 4: "data", 5: "storage"}
"""Exit codes of causes that remain: a new attempt would fail at the same place, or, on a full disk,
train up to its next save."""
OTHERS = {6: "memory", 7: "a plugin failed", PEER_LOST: "a peer was lost"}


@attrs.frozen
class Ending:
    """How one process ended."""

    rank: int
    status: int
    """The exit code, or the signal that killed it as a negative number."""
    time: float = math.inf
    """When it ended, in seconds of ``time.monotonic()``; infinite where that is not known."""

    @property
    def exit_code(self) -> int:
        """The exit code that a shell would report."""
        return 128 - self.status if self.status < 0 else self.status

    @property
    def final(self) -> str:
        """Why no new attempt follows, whatever number of restarts is left; "" if one may."""
        if self.exit_code in ASKED:
            return "not restarted: a signal asked for the end"
        if self.exit_code in SAME_AGAIN:
            return "not restarted: a new attempt would meet the same cause"
        return ""

    def __str__(self) -> str:
        words = {**SAME_AGAIN, **OTHERS, **ASKED}.get(self.status)
        words = f"killed by signal {-self.status}" if self.status < 0 else words
        code = f"exit code {self.exit_code}"
        return f"process {self.rank} ended with {code}" + (f" ({words})" if words else "")


def rank_of_cause(ending: Ending, stopped: float = math.inf) -> int:
    """Return how far an ending is from the cause: 0 for a cause of its own, 1 for a signal that
    asked for the end, 2 for a lost peer, 3 for what the launcher did after time ``stopped``."""
    if ending.time > stopped and (ending.exit_code in ASKED or ending.exit_code == KILLED):
        return 3
    if ending.exit_code == PEER_LOST:
        return 2
    return 1 if ending.exit_code in ASKED else 0


def cause(endings: Iterable[Ending], stopped: float = math.inf) -> Ending | None:
    """Return the ending that made the others end, or None if all processes finished.

    The first process that failed for a cause of its own counts, also if another process reported
    the loss of that peer before.
    """
    failed = [ending for ending in endings if ending.exit_code]
    return min(failed, key=lambda e: (rank_of_cause(e, stopped), e.time, e.rank), default=None)
