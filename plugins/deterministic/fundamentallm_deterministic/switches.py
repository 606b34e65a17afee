"""Read and set torch's switches for determinism together."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch.utils import deterministic

MEMORY: Any = deterministic  # torch's stub does not declare its attribute
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class Switches(NamedTuple):
    """The state of all switches that this plugin sets."""

    algorithms: bool
    warn_only: bool
    fill: bool
    benchmark: bool
    """Whether cuDNN may choose algorithms by measuring their speed."""
    workspace: str | None
    """cuBLAS's workspace setting in the environment; None if unset."""


def read_switches() -> Switches:
    """Return the current state."""
    return Switches(
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        MEMORY.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        os.environ.get(WORKSPACE),
    )


def turned_on(before: Switches, warn_only: bool, fill: bool) -> Switches:
    """Return the state for a deterministic run."""
    # Older versions of torch refuse to use cuBLAS deterministically without this variable. A value
    # that the user has set is kept.
    return Switches(
        algorithms=True,
        warn_only=warn_only,
        fill=fill,
        benchmark=False,
        workspace=before.workspace or ":4096:8",
    )


def set_switches(wanted: Switches) -> None:
    """Set all switches; torch sets those of the inductor itself."""
    torch.use_deterministic_algorithms(wanted.algorithms, warn_only=wanted.warn_only)
    MEMORY.fill_uninitialized_memory = wanted.fill
    torch.backends.cudnn.benchmark = wanted.benchmark
    if wanted.workspace is None:
        os.environ.pop(WORKSPACE, None)
    else:
        os.environ[WORKSPACE] = wanted.workspace
