"""The control group: small JSON values, exchanged between the hosts of a run's processes."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from fundamentallm import PeerError, why_lost

ROOM = 1024  # bytes of a message that are sent at once; most fit
_HEAD = 8  # bytes that state the length


class ControlGroup:
    """A gloo group of all processes."""

    def __init__(self, timeout: float) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def exchange(self, place: str, value: Any) -> list[Any]:
        """Return the values of all processes, by rank.

        ``place`` names the call. Raises ``PeerError`` if the processes are at different places, or
        if one of them has ended or does not answer in time.
        """
        try:
            found = self._gather(json.dumps([place, value]).encode())
        except RuntimeError as error:
            raise PeerError(
                f"process {self.rank} of {self.size} has lost another one ({place}): that one has "
                f"ended or hangs, and its own message says why ({why_lost(error)})"
            ) from error
        places = [place for place, _ in found]
        if len(set(places)) > 1:
            texts = "; ".join(f"process {rank} is at: {text}" for rank, text in enumerate(places))
            raise PeerError(
                f"the processes no longer do the same. {texts}. A plugin calls `agree` or logs a "
                "distributed tensor in some processes only, or their data differs in length"
            )
        return [value for _, value in found]

    def _gather(self, message: bytes) -> list[Any]:
        room, length = ROOM, len(message) + _HEAD
        while True:  # once, or twice if one of the messages is longer than the room
            part = length.to_bytes(_HEAD, "little") + message[: room - _HEAD]
            mine = torch.frombuffer(bytearray(part.ljust(room, b"\0")), dtype=torch.uint8)
            everyones = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(everyones, mine, group=self._group)
            rows = [bytes(row.numpy()) for row in everyones]
            lengths = [int.from_bytes(row[:_HEAD], "little") for row in rows]
            if max(lengths) <= room:
                return [json.loads(row[_HEAD:n]) for row, n in zip(rows, lengths, strict=True)]
            room = max(lengths)
