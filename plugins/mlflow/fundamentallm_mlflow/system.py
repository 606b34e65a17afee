"""How busy the machine is, under the names that MLflow's page for it looks for."""

from __future__ import annotations

import contextlib
import logging
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from fundamentallm_mlflow.store import Point

ASKED = "index,utilization.gpu,memory.used,memory.total,power.draw"
log = logging.getLogger("ship")


class SystemMetrics:
    """A look at CPU, memory and GPUs every ``seconds``; never, if they are 0."""

    def __init__(self, pid: int, seconds: float) -> None:
        self._pid = pid
        self._seconds = seconds
        self._next = 0.0
        self._gpus = shutil.which("nvidia-smi")
        psutil.cpu_percent()  # what follows is since the call before

    def points(self, since: float) -> list[Point]:
        """Return what there is to see, or nothing if it is not time yet; steps count the looks
        from ``since`` (Unix seconds) on."""
        now = time.time()
        if not self._seconds or now < self._next:
            return []
        self._next = now + self._seconds
        # From the clock: it goes on over all processes of a run, without having to be kept.
        step = int((now - since) / self._seconds)
        found = _host(self._pid) | self._devices()
        return [(f"system/{key}", value, int(now * 1000), step) for key, value in found.items()]

    def _devices(self) -> dict[str, float]:
        if self._gpus is None:
            return {}
        words = [self._gpus, f"--query-gpu={ASKED}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            log.exception("nvidia-smi tells nothing: GPUs are left out from here on")
            self._gpus = None
            return {}
        return {key: value for line in done.stdout.splitlines() for key, value in _device(line)}


def _host(pid: int) -> dict[str, float]:
    memory = psutil.virtual_memory()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
    }
    with contextlib.suppress(psutil.Error):  # it may just have ended
        found["training_memory_megabytes"] = psutil.Process(pid).memory_info().rss / 1e6
    return found


def _device(line: str) -> list[tuple[str, float]]:
    """Return the numbers of one line; a device may not know all of them (``[N/A]``)."""
    index, *texts = (text.strip() for text in line.split(","))
    numbers = [float(t) if t.replace(".", "", 1).isdigit() else None for t in texts]
    used, total = numbers[1], numbers[2]
    found = {
        "utilization_percentage": numbers[0],
        "memory_usage_megabytes": None if used is None else used * 1.048576,
        "memory_usage_percentage": 100 * used / total if used is not None and total else None,
        "power_usage_watts": numbers[3],
    }
    return [(f"gpu_{index}_{key}", value) for key, value in found.items() if value is not None]
