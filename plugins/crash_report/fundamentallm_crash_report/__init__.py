"""What a failed run was doing when it failed."""

from __future__ import annotations

import json
import os
import shutil
import traceback
from importlib import metadata
from typing import TYPE_CHECKING, Any

from fundamentallm import field, ge, hookimpl, plugin

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fundamentallm import Run

COUNTS = ("step", "applied", "microbatches", "samples", "tokens", "seconds")


@plugin
class CrashReport:
    """Write a folder ``crash/`` in the run folder when a run fails: what it was doing, and why."""

    rows: int = field(default=100, validator=ge(0))
    """How many of the last rows of metrics to put in."""

    observer = True

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        """Write the report of a failed run, in place of an older one."""
        if run.error is None:
            return
        folder = run.folder / ("crash" if run.rank == 0 else f"crash-rank-{run.rank}")
        beside = folder.with_name(f".{folder.name}-{os.getpid()}")
        beside.mkdir()
        for name, text in report(run, self.rows):
            (beside / name).write_text(text, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
        run.error.add_note(f"a report is in {folder}")


def report(run: Run, rows: int) -> Iterator[tuple[str, str]]:
    """Yield the names and texts of a failed run's report; ``rows`` of metrics at most."""
    error = run.error
    assert error is not None
    yield "traceback.txt", "".join(traceback.format_exception(error))
    yield "crash.json", written({
        "error": f"{type(error).__name__}: {error}",
        "step": run.progress.step + run.moment % 2,  # odd while a step is being attempted
        "doing": doing(run, error),
        "window": [{name: getattr(batch, name) for name in ("first", "samples", "weight")}
                   for batch in run.window],
        "seed": run.settings.seed,
        "progress": {name: getattr(run.progress, name) for name in COUNTS},
        "rejected": run.rejected,
        "memory": memory(run.device),
    })  # fmt: skip
    yield "settings.json", written(run.tables)
    versions = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    yield "versions.json", written(dict(sorted(versions.items())))
    last = run.history[-rows:] if rows else []
    yield "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in last)


def doing(run: Run, error: BaseException) -> str:
    """Tell in a few words what a run was in the middle of."""
    if not hasattr(run, "stream"):
        return "building"
    # The run is out of the validation by now; the traceback of what began it all is not.
    while error.__cause__ is not None:
        error = error.__cause__
    if any(frame.name == "validate" for frame in traceback.extract_tb(error.__traceback__)):
        return "validating"
    return "in a step" if run.moment % 2 else "between two steps"


def memory(device: str) -> dict[str, Any]:
    """Return what is known of the memory, in bytes."""
    import torch

    known: dict[str, Any] = {}
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info()
        known = {"free": free, "total": total, "peak": torch.cuda.max_memory_allocated()}
    return known


def written(value: Any) -> str:
    """Return a value as JSON to read."""
    return json.dumps(value, indent=2, default=str) + "\n"
