"""Write a report of a failed run: its error, step, window, settings and last metrics."""

from __future__ import annotations

import json
import logging
import os
import shutil
import traceback
from collections import deque
from contextlib import suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any

from fundamentallm import SettingsError, field, folder, ge, hookimpl, plugin

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fundamentallm import Run

COUNTS = ("step", "applied", "microbatches", "samples", "tokens", "seconds")
BUILDING = "building"
log = logging.getLogger("fundamentallm")


@plugin
class CrashReport:
    """Write ``crash/`` in the run folder when a run fails: error, step, window, last metrics."""

    role = "observer"

    rows: int = field(default=100, validator=ge(0))
    """Number of rows of metrics in the report, the last ones."""

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        """Write the report of a failed run; replace an older one."""
        target = run.folder / ("crash" if run.rank == 0 else f"crash-rank-{run.rank}")
        if run.error is None or not worth_it(run, target):
            return
        # Always the same name, so that the files of a killed process are overwritten.
        temporary = target.with_name(f".{target.name}")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            for name, text in report(run, self.rows):
                (temporary / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
        except OSError as error:
            log.warning(
                "crash_report: no report could be written to %s: %s",
                target,
                os.strerror(error.errno) if error.errno else error,
            )
        else:
            run.error.add_note(f"a report is in {target}")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def worth_it(run: Run, target: Path) -> bool:
    """Return whether a report of this failure should replace an older one.

    A failure before the first step is usually a mistake in the settings, and its message explains
    it. It must not replace the report of a failure in training.
    """
    if begun(run):
        return True
    if isinstance(run.error, SettingsError):
        return False
    with suppress(OSError, ValueError, TypeError, KeyError):
        return bool(json.loads((target / "crash.json").read_bytes())["doing"] == BUILDING)
    return True


def report(run: Run, rows: int) -> Iterator[tuple[str, str]]:
    """Yield the names and texts of a failed run's report; ``rows`` of metrics at most."""
    error = run.error
    assert error is not None
    yield "traceback.txt", "".join(traceback.format_exception(error))
    window = [
        {name: getattr(batch, name) for name in ("first", "samples", "weight")}
        for batch in run.window
    ]
    yield (
        "crash.json",
        written(
            {
                "error": f"{type(error).__name__}: {error}",
                "step": run.progress.step + run.in_step,
                "doing": doing(run, error),
                "window": window or "none yet",
                "seed": run.settings.seed,
                "progress": {name: getattr(run.progress, name) for name in COUNTS},
                "rejected": [{"cause": one.cause, "text": one.text} for one in run.rejected],
                "memory": memory(run.device),
            }
        ),
    )
    yield "settings.json", written(run.tables)
    versions = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    yield "versions.json", written(dict(sorted(versions.items())))
    yield "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in last_rows(run, rows))


def last_rows(run: Run, count: int) -> list[dict[str, float]]:
    """Return the last rows of metrics, those of earlier processes from ``metrics.jsonl``."""
    missing = count - len(run.history)
    if missing <= 0:
        return run.history[-count:] if count else []
    step = run.history[0]["step"] if run.history else run.progress.step + 1
    earlier = deque[dict[str, float]](maxlen=missing)
    with suppress(OSError):
        earlier.extend(
            {"step": row.step, **row.metrics} for row in folder.rows(run.folder) if row.step < step
        )
    return [*earlier, *run.history]


def begun(run: Run) -> bool:
    """Return whether everything is built and the training has begun."""
    return run.begun


def doing(run: Run, error: BaseException) -> str:
    """Return what a run was doing when it failed."""
    if not begun(run):
        return BUILDING
    # The run has left the validation by now; the traceback of the first error shows it.
    while error.__cause__ is not None:
        error = error.__cause__
    if any(frame.name == "validate" for frame in traceback.extract_tb(error.__traceback__)):
        return "validating"
    return "in a step" if run.in_step else "between two steps"


def memory(device: str) -> dict[str, Any]:
    """Return the free, total and peak memory of a CUDA device in bytes; {} elsewhere."""
    import torch

    known: dict[str, Any] = {}
    if device.startswith("cuda"):
        try:
            free, total = torch.cuda.mem_get_info()
            known = {"free": free, "total": total, "peak": torch.cuda.max_memory_allocated()}
        except RuntimeError as error:  # a failed device answers no more calls
            known = {"unknown": str(error)}
    return known


def written(value: Any) -> str:
    """Return a value as indented JSON."""
    return json.dumps(value, indent=2, default=str) + "\n"
