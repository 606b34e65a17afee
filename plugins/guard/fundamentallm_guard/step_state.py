"""State that an attempted step changes even if it is rejected: save it before, restore it after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from fundamentallm import Run


class StepState:
    """Running statistics at the beginning of a step.

    Batch normalization keeps its statistics in buffers. If they were not restored, a skipped step
    would change later ones. Random numbers follow from the count of applied updates.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._buffers = [*_buffers(run.model)]
        self._values: list[Tensor] = []

    def save(self) -> None:
        """Copy the state; without a device read."""
        self._values.clear()
        for module, name in self._buffers:
            self._values.append(getattr(module, name).clone())

    def restore(self) -> None:
        """Restore what ``save`` copied, and seed the random generators for the step."""
        self._run.seed_step()
        with torch.no_grad():
            for (module, name), value in zip(self._buffers, self._values, strict=True):
                getattr(module, name).copy_(value)


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the buffers that a checkpoint contains and that may be statistics.

    These are floating-point buffers and counters. Packed weights, which may be large, have other
    types.
    """
    saved = model.state_dict()
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            known = f"{path}.{name}" if path else name
            floats = buffer.is_floating_point() and buffer.element_size() > 1
            if known in saved and (floats or buffer.numel() == 1):
                yield module, name
