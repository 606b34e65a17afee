"""One recording of PyTorch's profiler, and the files that it ends in."""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from fundamentallm import Run
    from fundamentallm_profiler.profiler import Profiler

log = logging.getLogger("fundamentallm")


class Recording:
    """Warms up from the next step on, and records from step ``first`` on.

    Every hook call has a label with its plugin in the trace.
    """

    def __init__(self, run: Run, wanted: Profiler, first: int) -> None:
        self._run, self._wanted, self._first = run, wanted, first
        warmup = first - run.progress.step - 1
        self._left = warmup + wanted.steps
        self._profile = profile(
            activities=activities(run.device),
            schedule=schedule(wait=0, warmup=warmup, active=wanted.steps, repeat=1),
            on_trace_ready=self._write,
            record_shapes=wanted.record_shapes,
            profile_memory=wanted.profile_memory,
            with_stack=wanted.with_stack,
            with_flops=wanted.with_flops,
        )
        self._profile.start()
        self._before, self._labelled = run.hook, run.bind(labelled)
        run.hook = self._labelled

    def step_over(self) -> bool:
        """Count a step; return True if it was the last one and the files are written."""
        self._left -= 1
        if not self._left:
            self.end()
            return True
        try:
            self._profile.step()
        except BaseException:
            self._give_up()
            raise
        return False

    def end(self) -> None:
        """Stop, and write what has been recorded."""
        self._put_back()
        try:
            self._profile.stop()
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        self._put_back()
        self._profile.on_trace_ready = None
        with contextlib.suppress(Exception):  # it may have failed itself
            self._profile.stop()

    def _put_back(self) -> None:
        if self._run.hook is self._labelled:
            self._run.hook = self._before

    def _write(self, recorded: profile) -> None:
        run, wanted = self._run, self._wanted
        folder = run.folder / "profile"
        name = run.name_of(wanted)
        folder = folder if name == "profiler" else folder / name
        folder.mkdir(parents=True, exist_ok=True)
        end = f"{self._first:08d}" + (f"-rank{run.rank}" if wanted.all_ranks else "")
        with whole(folder / f"trace-{end}.json.gz") as path:
            recorded.export_chrome_trace(str(path))
        by = "self_device_time_total" if run.device.startswith("cuda") else "self_cpu_time_total"
        averages = recorded.key_averages(group_by_input_shape=wanted.record_shapes)
        with whole(folder / f"table-{end}.txt") as path:
            path.write_text(averages.table(sort_by=by, row_limit=wanted.rows), "utf-8")
        if wanted.memory_snapshot and run.device.startswith("cuda"):
            write_memory(folder, end, run.device)
        last = self._first + wanted.steps - self._left - 1
        log.info("profiled steps %d to %d: %s", self._first, last, folder)


def activities(device: str) -> list[ProfilerActivity]:
    """Return the activities to record on ``run.device``."""
    gpu = [ProfilerActivity.CUDA] if device.startswith("cuda") else []
    return [ProfilerActivity.CPU, *gpu]


def labelled(plugin: str, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call`` with a label in the trace: ``grad_clip.edit_gradients``."""
    label = f"{plugin}.{hook}" if plugin else hook

    def labelled_call(**given: Any) -> Any:
        with record_function(label):
            return call(**given)

    return labelled_call


def write_memory(folder: Path, end: str, device: str) -> None:
    """Write the blocks of PyTorch's allocator, and a summary as text."""
    with whole(folder / f"memory-{end}.json.gz") as path, gzip.open(path, "wt") as file:
        found: Any = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        json.dump(found, file, default=str)
    with whole(folder / f"memory-{end}.txt") as path:
        path.write_text(torch.cuda.memory_summary(device), "utf-8")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file becomes ``path`` when the block ends."""
    temporary = path.with_name(f".{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
