"""State that an attempted step changes even if it is rejected: save it before, restore it after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from fundamentallm import Run


class StepState:
    """Random state and running statistics at the beginning of a step.

    Dropout draws from torch's generators, and batch normalization keeps its statistics in buffers.
    If neither were restored, a skipped step would change later ones.
    """

    def __init__(self, run: Run) -> None:
        self._generators = [*_generators(run.device)]
        self._buffers = [*_buffers(run.model)]
        self._states: list[Tensor] = []
        self._values: list[Tensor] = []

    def save(self) -> None:
        """Copy the state; without a device read."""
        self._states.clear()
        for get, _ in self._generators:
            self._states.append(get())
        self._values.clear()
        for module, name in self._buffers:
            self._values.append(getattr(module, name).clone())

    def restore(self) -> None:
        """Restore what ``save`` copied."""
        for (_, put), state in zip(self._generators, self._states, strict=True):
            put(state)
        with torch.no_grad():
            for (module, name), value in zip(self._buffers, self._values, strict=True):
                getattr(module, name).copy_(value)


def _generators(device: str) -> Iterator[tuple[Callable[[], Tensor], Callable[[Tensor], Any]]]:
    """Yield the getter and the setter of the state of each generator that a model may draw from."""
    yield torch.default_generator.get_state, torch.default_generator.set_state
    if device.startswith("cuda"):
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        yield generator.get_state, generator.set_state
    elif device == "mps":
        yield torch.mps.get_rng_state, torch.mps.set_rng_state


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
