"""A model in a file of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save

from fundamentallm import StorageError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn


def write(path: Path, model: nn.Module) -> None:
    """Write the tensors of a state dict as safetensors: durably, and whole or not at all.

    Every name has a tensor of its own, also those of tied weights, so that
    ``model.load_state_dict(load_file(path))`` takes it. Raises ``StorageError``.
    """
    # Copies of their own: the format knows no shared memory.
    tensors = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    beside = path.with_name(f".{path.name}")
    try:
        with beside.open("wb") as file:
            file.write(save(tensors))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
