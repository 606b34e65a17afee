"""Accumulate the gradients of several micro-batches in one optimizer step."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from fundamentallm import field, ge, hookimpl, plugin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fundamentallm import Batch


@plugin
class Accumulate:
    """Add up the gradients of ``microbatches`` micro-batches before each optimizer step.

    The gradients are those of one large batch, because the core weighs each micro-batch by its
    number of targets.
    """

    role = "training"

    microbatches: int = field(validator=ge(1))
    """Micro-batches in one step. The step's batch size is this times the data's `batch_size`."""

    changeable = ("microbatches",)

    @hookimpl
    def collect_batches(self, stream: Iterator[Batch]) -> list[Batch]:
        """Take the next ``microbatches`` micro-batches as the window of one step."""
        return list(islice(stream, self.microbatches))
