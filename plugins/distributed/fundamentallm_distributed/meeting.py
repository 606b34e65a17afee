"""Where the launchers of all nodes meet: torch's rendezvous, and what they agree on through it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import attrs
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousInfo
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

from fundamentallm_distributed.endings import Ending, rank_of_cause

if TYPE_CHECKING:
    from fundamentallm_distributed.attempt import Attempt

VERDICT, COUNT, LEFT = (f"fundamentallm/{name}" for name in ("verdict", "count", "left"))
WAIT = 3.0
"""Seconds in which the launcher of the node that failed can say why."""
LEAVE = 5.0
"""Seconds for which a launcher remains after the end, so that the others can read why."""


@attrs.frozen
class Verdict:
    """What all launchers agree on after an attempt failed."""

    ending: Ending
    """The one that caused the end."""
    joined: bool = False
    """Whether the attempt ended so that further nodes can join, which is no failure."""

    def dump(self) -> str:
        """Write it as the text that ``load`` reads."""
        return json.dumps([self.ending.rank, self.ending.status, self.joined])

    @classmethod
    def load(cls, text: bytes) -> Verdict:
        """Read what ``dump`` wrote."""
        rank, status, joined = json.loads(text)
        return cls(Ending(rank, status), joined)


class Meeting(DynamicRendezvousHandler):
    """The rendezvous of torch's agent, which also makes the launcher look after the attempt.

    The agent asks it ten times a second, while processes run, whether nodes wait to join. It always
    answers that there are none: to restart the processes, the agent would give them 30 seconds.
    """

    attempt: Attempt | None = None
    info: RendezvousInfo | None = None
    several: bool = False
    """Whether there may be launchers of other nodes."""
    restarts: int = 0
    """How many restarts there have been."""
    most_restarts: int = 0
    """How many there may be."""
    lost: bool = False
    """Whether the launcher that has the store is gone."""

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for the other nodes, and prepare the start of the processes."""
        assert self.attempt is not None
        self.info = super().next_rendezvous()
        if self.several:
            # Nodes that came later know fewer restarts.
            if self.info.rank == 0:
                self.info.store.set(COUNT, str(self.restarts))
            self.restarts = int(self.info.store.get(COUNT))
        # The agent's own values are 0, since each attempt has an agent of its own.
        counts = {
            "TORCHELASTIC_RESTART_COUNT": str(self.restarts),
            "TORCHELASTIC_MAX_RESTARTS": str(self.most_restarts),
        }
        self.attempt.begin(counts)
        return self.info

    def num_nodes_waiting(self) -> int:
        """Look after the attempt."""
        assert self.attempt is not None
        if self.attempt.look(self._waiting()):
            self.publish(Verdict(Ending(0, 0), joined=True), 0)
        return 0

    def _waiting(self) -> int:
        if not self.several or self.lost:
            return 0
        try:
            return super().num_nodes_waiting()
        except RendezvousError:
            # The processes of the node that is gone are peers of those here, which end soon.
            self.lost = True
            return 0

    def agree(self, ending: Ending, attempt: Attempt) -> Verdict:
        """Return what the first launcher that knows the cause has published, or publish this."""
        if not self.several:
            return Verdict(ending)
        distance = rank_of_cause(ending, attempt.stopped)
        sure = distance == 0 or bool(attempt.requests.collected)
        verdict = self.publish(Verdict(ending), 0 if sure else WAIT)
        if verdict.joined:
            # What happened here while the processes ended for a new node counts nevertheless.
            return Verdict(ending, joined=not sure)
        return verdict

    def publish(self, verdict: Verdict, seconds: float) -> Verdict:
        """Publish a verdict if there is none after some seconds; return the one that holds."""
        assert self.info is not None
        store, until = self.info.store, time.monotonic() + seconds
        try:
            while time.monotonic() < until and not store.check([VERDICT]):
                time.sleep(0.1)
            return Verdict.load(store.compare_set(VERDICT, "", verdict.dump()))
        except RuntimeError:  # the launcher that has the store is gone
            self.lost = True
            return verdict

    def close(self, *, finished: bool) -> None:
        """Close the meeting for all nodes; if the job failed, once they have read the verdict."""
        # After success, torch's agents have waited for each other.
        wait = self.several and not finished and not self.lost
        try:
            if wait and self.info is not None:
                store, until = self.info.store, time.monotonic() + LEAVE
                store.add(LEFT, 1)
                while store.add(LEFT, 0) < self.info.world_size and time.monotonic() < until:
                    time.sleep(0.1)
            self.shutdown()
        except (RuntimeError, RendezvousError):
            self.lost = True  # its store ends with the launcher that has it
