"""The base weights: read from a file, and held against what the model has."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from fundamentallm import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from torch import Tensor, nn

_SHOWN = 3


def file_of(path: Path) -> Path:
    """Return the file that holds the weights: ``path``, or the one in the folder ``path``."""
    return path / "model.safetensors" if path.is_dir() else path


def load(model: nn.Module, file: Path, setting: str) -> None:
    """Load all weights of ``model`` from a safetensors file, each in the model's own type.

    Weights that the model has in common need be in the file but once. Raises ``StorageError`` if
    the file cannot be read, or holds less, more or something else than the model has.
    """
    found, own = _read(file, setting), model.state_dict()
    first: dict[tuple[int, object], str] = {}
    for name, tensor in own.items():
        if name in found:
            first.setdefault((tensor.data_ptr(), tensor.shape), name)
    for name, tensor in own.items():
        tied = first.get((tensor.data_ptr(), tensor.shape))
        if name not in found and tied is not None and tensor.numel():
            found[name] = found[tied]
    problems = [
        *_told("it lacks", own.keys() - found.keys()),
        *_told("the model has no", found.keys() - own.keys()),
        *_told(
            "another shape than the model's has",
            (
                f"{name} ({list(found[name].shape)} for {list(own[name].shape)})"
                for name in own.keys() & found.keys()
                if own[name].shape != found[name].shape
            ),
        ),
    ]
    if any(name.endswith(".lora_a") for name in found.keys() - own.keys()):
        problems = ["it holds adapters of another run; merge them with: fundamentallm lora-merge"]
    if problems:
        raise StorageError(f"{setting}: {file} is not of this model: {'; '.join(problems)}")
    model.load_state_dict(found)


def _read(file: Path, setting: str) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            found: dict[str, Tensor] = {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118
            # How a checkpoint names a tensor that goes by several names.
            aliases = json.loads((opened.metadata() or {}).get("aliases", "{}"))
        return found | {name: found[owner] for name, owner in aliases.items()}
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise StorageError(f"{setting}: {file} is no sound safetensors file: {error}") from error


def _told(what: str, names: Iterable[str]) -> list[str]:
    listed = sorted(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return [f"{what} {', '.join(listed[:_SHOWN])}{more}"] if listed else []
