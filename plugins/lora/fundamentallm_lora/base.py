"""Load the base weights from a safetensors file, and check that they fit the model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from fundamentallm import StorageError, command_line

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor, nn

_SHOWN = 3
"""How many names an error lists."""


def weights_file(path: Path) -> Path:
    """Return the file with the weights: ``path``, or ``model.safetensors`` in the folder."""
    return path / "model.safetensors" if path.is_dir() else path


def load(model: nn.Module, file: Path, setting: str) -> None:
    """Load all weights of ``model`` from a safetensors file, converted to the model's types.

    Tied weights may be in the file once. ``setting`` begins errors. Raises ``StorageError`` if the
    file cannot be read, or if its names or shapes differ from the model's.
    """
    found, own = _read(file, setting), model.state_dict()
    _add_tied(found, own)
    problems = [
        *_difference("it lacks", own.keys() - found.keys()),
        *_difference("the model has no", found.keys() - own.keys()),
        *_difference(
            "other shapes than in the model:",
            (
                f"{name} ({list(found[name].shape)}, expected {list(own[name].shape)})"
                for name in own.keys() & found.keys()
                if own[name].shape != found[name].shape
            ),
        ),
    ]
    if any(name.endswith(".lora_a") for name in found.keys() - own.keys()):
        merge = command_line("lora-merge")
        problems = [f"it contains adapters of another run; merge them with: {merge}"]
    if problems:
        raise StorageError(f"{setting}: {file} does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(found)


def _add_tied(found: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Add the other names of tied weights that the file has under one name."""
    first: dict[tuple[int, object], str] = {}
    for name, tensor in own.items():
        if name in found:
            first.setdefault((tensor.data_ptr(), tensor.shape), name)
    for name, tensor in own.items():
        tied = first.get((tensor.data_ptr(), tensor.shape))
        if name not in found and tied is not None and tensor.numel():
            found[name] = found[tied]


def _read(file: Path, setting: str) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            found: dict[str, Tensor] = {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118
            # A checkpoint stores a tensor with several names once, and the other names here.
            aliases = json.loads((opened.metadata() or {}).get("aliases", "{}"))
        return found | {name: found[owner] for name, owner in aliases.items()}
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise StorageError(f"{setting}: {file} is not a safetensors file: {error}") from error


def _difference(what: str, names: Iterable[str]) -> list[str]:
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return [f"{what} {', '.join(listed[:_SHOWN])}{more}"] if listed else []
