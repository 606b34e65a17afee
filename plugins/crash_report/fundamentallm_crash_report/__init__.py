"""What a failed run was doing when it failed."""

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

from fundamentallm import SettingsError, field, ge, hookimpl, plugin

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fundamentallm import Run

COUNTS = ("step", "applied", "microbatches", "samples", "tokens", "seconds")
BUILDING = "building"
log = logging.getLogger("fundamentallm")


@plugin
class CrashReport:
    """Write a folder ``crash/`` in the run folder when a run fails: what it was doing, and why."""

    role = "observer"

    rows: int = field(default=100, validator=ge(0))
    """How many of the last rows of metrics to put in."""

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        """Write the report of a failed run, in place of an older one."""
        folder = run.folder / ("crash" if run.rank == 0 else f"crash-rank-{run.rank}")
        if run.error is None or not worth_it(run, folder):
            return
        # Always the same name: what a killed process left is written over, not left for ever.
        beside = folder.with_name(f".{folder.name}")
        try:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            for name, text in report(run, self.rows):
                (beside / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
        except OSError as error:
            log.warning(
                "crash_report: no report could be written to %s: %s",
                folder,
                os.strerror(error.errno) if error.errno else error,
            )
        else:
            run.error.add_note(f"a report is in {folder}")
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def worth_it(run: Run, folder: Path) -> bool:
    """Tell whether a failure is worth a report at the price of the one that is there.

    What fails before the first step is mostly a mistake in how the run was called: of settings, the
    message says all; and what once failed in training is not to be lost over it.
    """
    if begun(run):
        return True
    if isinstance(run.error, SettingsError):
        return False
    with suppress(OSError, ValueError, TypeError, KeyError):
        return bool(json.loads((folder / "crash.json").read_bytes())["doing"] == BUILDING)
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
    """Return the last rows of metrics, also those of the processes that trained the run before, as
    far as ``metrics.jsonl`` in the run folder has them."""
    missing = count - len(run.history)
    if missing <= 0:
        return run.history[-count:] if count else []
    step = run.history[0]["step"] if run.history else run.progress.step + 1
    lines: list[str] = []
    with (
        suppress(OSError),
        (run.folder / "metrics.jsonl").open(encoding="utf-8", errors="replace") as file,
    ):
        # No more are of use: what is in `history` is here again, and the last may be cut short.
        lines = list(deque(file, count + 1))
    earlier = [row for row in map(read, lines) if row and row["step"] < step]
    return earlier[-missing:] + run.history


def read(line: str) -> dict[str, float]:
    """Return the row of a line; nothing if it is none, such as one that was cut short."""
    try:
        row = json.loads(line)
        metrics = {name: float(value) for name, value in row["metrics"].items()}
        return {"step": int(row["step"]), **metrics}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return {}


def begun(run: Run) -> bool:
    """Tell whether a run has come to its first step."""
    return hasattr(run, "stream")


def doing(run: Run, error: BaseException) -> str:
    """Tell in a few words what a run was in the middle of."""
    if not begun(run):
        return BUILDING
    # The run is out of the validation by now; the traceback of what began it all is not.
    while error.__cause__ is not None:
        error = error.__cause__
    if any(frame.name == "validate" for frame in traceback.extract_tb(error.__traceback__)):
        return "validating"
    return "in a step" if run.in_step else "between two steps"


def memory(device: str) -> dict[str, Any]:
    """Return what is known of the memory, in bytes."""
    import torch

    known: dict[str, Any] = {}
    if device.startswith("cuda"):
        try:
            free, total = torch.cuda.mem_get_info()
            known = {"free": free, "total": total, "peak": torch.cuda.max_memory_allocated()}
        except RuntimeError as error:  # a device that has failed answers nothing more
            known = {"unknown": str(error)}
    return known


def written(value: Any) -> str:
    """Return a value as JSON to read."""
    return json.dumps(value, indent=2, default=str) + "\n"
