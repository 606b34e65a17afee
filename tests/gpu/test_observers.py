"""What observers find out about a GPU: its times, its memory, its kernels."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import gpu
import pytest
import torch

from fundamentallm import hookimpl, plugin
from fundamentallm.testing import TinyRun

STEPS = 8


@plugin
class Busy:
    """Gives a GPU work in the forward pass for far longer than the host needs to queue a step."""

    device: str
    seconds: float
    spans: Any

    @hookimpl(wrapper=True)
    def forward(self) -> Any:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        gpu.occupy(self.device, self.seconds)
        loss = yield
        ended.record()
        self.spans.append((began, ended))
        return loss


# On a CPU the moments of the host are those of the device: plugins/throughput/tests has a clock of a
# device that executes its queue later, with moments that are reached when it is waited for.
@pytest.mark.cuda(seconds=10)
def test_throughput_times_what_the_gpu_does_and_not_what_the_host_queues(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    gpu.prepare_to_occupy("cuda")
    spans: list[Any] = []
    settings = {"throughput": {"sample_every": 1, "flops_per_token": 1e9}}
    words = {"device": "cuda", "length": STEPS, "log_every": STEPS}
    busy = Busy(device="cuda", seconds=0.05, spans=spans)
    run = tiny_run("throughput", busy, settings=settings, **words)
    gpu.synchronize("cuda")
    # The first step has a row of its own, and after the steps follows a validation.
    measured = sum(began.elapsed_time(ended) for began, ended in spans[1:STEPS]) / 1000
    facts = json.loads((run.folder / "throughput.json").read_text())
    forward = sum(row["seconds"] for row in facts["where"] if row["phase"] == "forward")
    assert forward == pytest.approx(measured, rel=0.1)
    row = run.history[-1]
    assert 0 < row["system/device_memory_allocated_gib"] <= row["system/device_memory_reserved_gib"]
    # Without the last step, which the host waits for only to write the row.
    assert row["perf/step_ms"] * STEPS >= 0.9 * 1000 * measured * (STEPS - 2) / (STEPS - 1)


@pytest.mark.cuda
def test_the_share_of_the_peak_that_a_known_gpu_reaches_is_logged(tiny_run: TinyRun) -> None:
    from fundamentallm_throughput.device import peak_flops

    peak = peak_flops("cuda")
    if peak is None:
        pytest.skip(f"the peak of {torch.cuda.get_device_name()} is not in the table")
    settings = {"throughput": {"flops_per_token": 1e9}}
    row = tiny_run("throughput", settings=settings, device="cuda").history[-1]
    assert row["perf/mfu"] == pytest.approx(1e9 * row["perf/tokens_per_second"] / peak)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda(seconds=30))]
)
def test_a_trace_has_the_plugins_and_what_the_device_did_for_them(
    tiny_run: TinyRun, tmp_path: Path, device: str
) -> None:
    # All rows: by the time of the device, that of a label is the last.
    settings = {"profiler": {"start": 3, "steps": 2, "rows": 1000}}
    run = tiny_run("profiler", "grad_clip", settings=settings, device=device, length=STEPS)
    folder = run.folder / "profile"
    with gzip.open(folder / "trace-00000003.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {event.get("name") for event in events}
    assert "grad_clip.edit_gradients" in names
    kernels = [event for event in events if event.get("cat") == "kernel"]
    assert bool(kernels) == (device == "cuda")
    table = (folder / "table-00000003.txt").read_text()
    assert "grad_clip.edit_gradients" in table
    assert ("CUDA total" in table) == (device == "cuda")
    memory = folder / "memory-00000003.txt"
    assert memory.exists() == (device == "cuda")


@pytest.mark.parametrize("device", gpu.DEVICES)
def test_mlflow_s_worker_measures_every_gpu(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without MLflow: the worker writes to a file, and uploads from there."""
    from fundamentallm_mlflow.journal import Journal
    from fundamentallm_mlflow.worker.system_metrics import FILE, SystemMetrics

    if device == "cpu":
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\necho '0, 35, 257, 81920, 210.55'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        count = 1
    elif shutil.which("nvidia-smi") is None:
        pytest.skip("the driver's nvidia-smi is not on the PATH")
    else:
        count = torch.cuda.device_count()
    held = torch.ones(2**26, device=device)
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("start")
    SystemMetrics(tmp_path, os.getpid(), 1.0).measure()
    journal.close()
    metrics = json.loads((tmp_path / FILE).read_text().splitlines()[-1])["metrics"]
    for index in range(count):
        gpus = {key: metrics[key] for key in metrics if key.startswith(f"system/gpu_{index}_")}
        assert 0 < gpus[f"system/gpu_{index}_memory_usage_percentage"] <= 100
        # Of what a driver does not know, no metric is written.
        assert 0 <= gpus.get(f"system/gpu_{index}_utilization_percentage", 0) <= 100
        assert gpus.get(f"system/gpu_{index}_power_usage_watts", 1) > 0
    assert metrics["system/gpu_0_memory_usage_megabytes"] > held.nbytes / 1e6
