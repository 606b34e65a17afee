"""A step on a GPU: the host waits for nothing but what a plugin must know to decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gpu
import pytest

from fundamentallm import Run, hookimpl, plugin
from fundamentallm.testing import Recorder, TinyRun

LOG_EVERY = 10
FIRST, LAST = 11, 19
"""The steps between which the waits are counted: between two rows."""
NEVER = 10**9
LISTED = [
    "text",
    "gpt",
    "adamw",
    "accumulate",
    "grad_clip",
    "lr_schedule",
    "ema",
    "throughput",
    "progress",
    "jsonl",
    "console",
    "checkpoint",
]


def tables(folder: Path, more: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": {"length": 2 * LOG_EVERY, "log_every": LOG_EVERY},
        "text": gpu.corpus(folder) | {"context_length": 16, "batch_size": 4},
        "gpt": {"num_layers": 2, "num_heads": 2, "d_model": 32, "dropout": 0.1},
        "accumulate": {"microbatches": 2},
        "lr_schedule": {"warmup": "5 steps"},
        "throughput": {"sample_every": 3},
        "checkpoint": {"every": NEVER, "save_final": False},
        **more,
    }


@plugin
class Watch:
    """Counts waits between the safe points of two steps."""

    waits: Any

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if run.progress.step == FIRST:
            self.waits.start()
        if run.progress.step == LAST:
            self.waits.stop()


BF16, FP16 = {"amp": {"dtype": "bf16"}}, {"amp": {"dtype": "fp16", "init_scale": 1024.0}}
GUARD: dict[str, Any] = {"guard": {}}


CASES = [
    pytest.param({}, 0, id="plain"),
    pytest.param(BF16, 0, id="bf16"),
    pytest.param({"gc": {"every": 3}, "grad_stats": {}}, 0, id="gc-grad_stats"),
    pytest.param(GUARD, 1, id="guard"),
    pytest.param(BF16 | GUARD, 1, id="bf16-guard"),
    pytest.param(FP16, 1, id="fp16"),
]


@pytest.mark.parametrize("device", gpu.DEVICES)
@pytest.mark.parametrize(("more", "each"), CASES)
def test_between_two_rows_the_host_waits_only_for_what_a_plugin_must_decide(
    tiny_run: TinyRun, tmp_path: Path, device: str, more: dict[str, Any], each: int
) -> None:
    with gpu.Waits(device) as waits:
        settings = tables(tmp_path, more)
        run = tiny_run(*LISTED, *more, Watch(waits=waits), settings=settings, device=device)
    assert run.outcome == "finished"
    assert len(waits.places) == each * (LAST - FIRST), waits.places
    assert waits.reads.count == each * (LAST - FIRST), waits.reads.found
    assert all(parameter.device.type == device for parameter in run.parameters)


# The test above is its counterpart on the CPU, where no mode makes a wait an error.
@pytest.mark.cuda
@pytest.mark.parametrize("more", [case.values[0] for case in CASES if not case.values[1]])
def test_between_two_rows_no_plugin_waits_where_waiting_is_an_error(
    tiny_run: TinyRun, tmp_path: Path, more: dict[str, Any]
) -> None:
    with gpu.Waits("cuda", strict=True) as waits:
        settings = tables(tmp_path, more)
        run = tiny_run(*LISTED, *more, Watch(waits=waits), settings=settings, device="cuda")
    assert run.outcome == "finished"
    # An observer that fails is muted, and the run goes on.
    assert "Traceback" not in (run.folder / "train.log").read_text()


# Its counterpart on the CPU is what it compares with.
@pytest.mark.cuda
@pytest.mark.parametrize("more", [{}, BF16 | GUARD], ids=["plain", "bf16-guard"])
def test_a_gpu_gets_the_same_hooks_in_the_same_order_as_a_cpu(
    tiny_run: TinyRun, tmp_path: Path, more: dict[str, Any]
) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        recorder = Recorder()
        settings = tables(tmp_path, more)
        folder = tmp_path / device
        tiny_run(*LISTED, *more, settings=settings, device=device, trace=recorder, run_dir=folder)
        found[device] = [name for name in recorder.names if name != "on_progress"]
    assert found["cuda"] == found["cpu"]
