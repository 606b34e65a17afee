"""List runs and watch one: their state, progress and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path

from fundamentallm import FundamentalError, StorageError, folder
from fundamentallm_runs.run_record import Record, read
from fundamentallm_runs.tail import Tail

FACTS = ("run", "state", "step", "done", "best", "best_step", "written", "error", "note")
UNBEGUN = "failed before its first step"


def listed(parent: Path, metric: str, warn: Callable[[str], object]) -> list[dict[str, object]]:
    """Return the facts of the runs in a folder, the newest last; ``warn`` of unreadable ones."""
    if not parent.is_dir():
        raise StorageError(f"{parent}: there is no such folder")
    folders = [inner for inner in sorted(parent.iterdir()) if folder.is_run(inner)]
    found = sorted((_facts(inner, metric, warn) for inner in folders), key=itemgetter(0))
    return [facts for _, facts in found]


def table(rows: list[dict[str, object]]) -> list[list[str]]:
    """Return the rows of the table that people read."""
    shown = FACTS[:-2]
    return [[_shown(row[name]) for name in shown] for row in rows]


def notes(rows: list[dict[str, object]]) -> list[str]:
    """Return a line for each run that has no rows."""
    return [f"{row['run']}: {row['note']}" for row in rows if row["note"]]


def follow(
    run: Path, metrics: tuple[str, ...], every: float, show: Callable[[str], object]
) -> None:
    """Show the rows of a run as they come, until it ends, and then how it ended."""
    record = read(run)
    if record.lacks_rows and record.state == "running":
        show(record.lacks_rows)
    tail = Tail(run / folder.METRICS)
    while True:
        alive = folder.is_running(run)  # before the rows, or the last ones could be missed
        for line in filter(None, (_line(row, metrics) for row in tail.rows())):
            show(line)
        if not alive:
            break
        time.sleep(every)
    ended = read(run)
    state = described(ended)
    if ended.lacks_rows:
        show(f"{ended.lacks_rows}; the last step is {ended.step}")
    show(": ".join(filter(None, (str(run), state, ended.error))))


def described(record: Record) -> str:
    """Return the state of a run in words."""
    return UNBEGUN if record.state == "failed" and not record.begun else record.state


def _facts(
    path: Path, metric: str, warn: Callable[[str], object]
) -> tuple[float, dict[str, object]]:
    """Return the time of a run's start, and its facts: also of a folder that is unreadable."""
    try:
        record = read(path)
    except FundamentalError as error:
        warn(str(error))
        facts = {"run": path.name, "state": "unreadable", "error": str(error)}
        return 0.0, dict.fromkeys(FACTS) | facts
    best, share = record.best(metric), record.share
    values = (
        record.name,
        described(record),
        record.step,
        None if share is None else f"{share:.0%}",
        best[1] if best else None,
        best[0] if best else None,
        _when(record.written),
        record.error,
        record.lacks_rows,
    )
    # A start that failed has no environment.json with a time; the end has one.
    started = record.started or (record.ending.time if record.ending else 0.0)
    return started, dict(zip(FACTS, values, strict=True))


def _when(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds")
    except (OverflowError, ValueError, OSError):  # the time of a damaged row
        return None


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _line(row: folder.Row, metrics: tuple[str, ...]) -> str | None:
    chosen = {n: v for n, v in row.metrics.items() if not metrics or n in metrics}
    text = ", ".join(f"{name} {value:,.5g}" for name, value in chosen.items())
    return f"step {row.step}: {text}" if text else None
