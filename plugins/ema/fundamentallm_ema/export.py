"""Write a model's weights to a safetensors file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import save

from fundamentallm import write_durably

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any


def write_weights(path: Path, weights: dict[str, Any]) -> None:
    """Write the tensors of a state dict durably as safetensors.

    Every name has a tensor of its own, also those of tied weights, so that
    ``model.load_state_dict(load_file(path))`` accepts the file. Raises ``StorageError``.
    """
    # Copies, because the format allows no shared memory.
    tensors = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in weights.items()
        if isinstance(value, torch.Tensor)
    }
    write_durably(path, save(tensors))
