"""What makes torch deterministic, read and set as one."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch.utils import deterministic

MEMORY: Any = deterministic  # its one attribute is no declared one
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class Switches(NamedTuple):
    """The state of everything that this plugin sets."""

    algorithms: bool
    warn_only: bool
    fill: bool
    benchmark: bool
    """Whether cuDNN may choose algorithms by how long they take."""
    workspace: str | None
    """The memory of cuBLAS; None for what it does by itself."""


def now() -> Switches:
    """Return how everything stands."""
    return Switches(
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        MEMORY.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        os.environ.get(WORKSPACE),
    )


def turned_on(before: Switches, warn_only: bool, fill: bool) -> Switches:
    """Return how everything stands in a deterministic run."""
    # Older versions of torch refuse to use cuBLAS deterministically without this variable;
    # what somebody has chosen in the environment stays.
    return Switches(
        algorithms=True,
        warn_only=warn_only,
        fill=fill,
        benchmark=False,
        workspace=before.workspace or ":4096:8",
    )


def set_switches(wanted: Switches) -> None:
    """Set everything; for inductor, torch does so by itself."""
    torch.use_deterministic_algorithms(wanted.algorithms, warn_only=wanted.warn_only)
    MEMORY.fill_uninitialized_memory = wanted.fill
    torch.backends.cudnn.benchmark = wanted.benchmark
    if wanted.workspace is None:
        os.environ.pop(WORKSPACE, None)
    else:
        os.environ[WORKSPACE] = wanted.workspace
