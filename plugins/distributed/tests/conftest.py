"""Runs on ragged data, for the tests of all plugins that train in several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fundamentallm.testing import Trained, TwoProcesses

GPT = {"num_layers": 2, "d_model": 32, "num_heads": 4}
STEPS = 30


@pytest.fixture
def ragged(two_processes: TwoProcesses, tmp_path: Path) -> Any:
    """Train on ragged data in some number of processes.

    The run folder is ``folder``, or one of its own for each number of processes.
    """

    def train(
        processes: int, *plugins: Any, kind: str = "ddp", run_dir: str = "run", **more: Any
    ) -> list[Trained]:
        listed = ["gpt", *plugins]
        if "optimizer" not in more:
            listed += ["adamw", "grad_clip"]
        tables: dict[str, Any] = {"gpt": GPT, "run": {"validate_every": 10, "log_every": 5}}
        if "grad_clip" in listed:
            tables["grad_clip"] = {"max_norm": 0.5}
        return two_processes(
            *listed,
            processes=processes,
            kind=kind,
            settings=tables | more.get("tables", {}),
            run_dir=tmp_path / more.get("folder", f"{run_dir}/{processes}"),
            length=more.get("length", STEPS),
        )

    return train
