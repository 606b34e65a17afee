"""Several micro-batches in one optimizer step."""

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

    The result is that of one big batch: the core weighs each micro-batch by the targets it holds.
    """

    microbatches: int = field(validator=ge(1))
    """Micro-batches in one step; the batch size of the step is this times the data's."""

    changeable = ("microbatches",)

    @hookimpl
    def collect_batches(self, stream: Iterator[Batch]) -> list[Batch]:
        """Take the next ``microbatches`` micro-batches as one window."""
        return list(islice(stream, self.microbatches))
