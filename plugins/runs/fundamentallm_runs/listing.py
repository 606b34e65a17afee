"""The commands ``runs`` and ``watch``: what is there, and what is going on."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path

import click

from fundamentallm import FundamentalError, StorageError
from fundamentallm_runs.record import Record, is_run, is_running, read
from fundamentallm_runs.rows import Row
from fundamentallm_runs.streams import number, take_any_text
from fundamentallm_runs.tail import Tail

FOLDER = click.Path(path_type=Path, file_okay=False)
TOLD = ("run", "state", "step", "done", "best", "best_step", "written", "error")


@click.command()
@click.argument("folder", type=FOLDER, default=Path("runs"))
@click.option("--metric", default="val/loss", show_default=True, help="Whose best value to show.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def runs(folder: Path, metric: str, as_json: bool) -> None:
    """List the runs in FOLDER (by default runs/), the newest last."""
    take_any_text()
    if not folder.is_dir():
        raise StorageError(f"{folder}: there is no such folder")
    folders = [inner for inner in sorted(folder.iterdir()) if is_run(inner)]
    looks = sorted((_looked_at(inner, metric) for inner in folders), key=itemgetter(0))
    rows = [row for _, row in looks]
    if as_json:
        click.echo(json.dumps(rows, indent=2, allow_nan=False))
        return
    if not rows:
        click.echo(f"{folder}: no runs")
        return
    from fundamentallm_runs.tables import console, show

    numbers = ("step", "done", f"best {metric}", "at step", "last row")
    told = [[_shown(value) for value in row.values()][: 2 + len(numbers)] for row in rows]
    show(console(120), ["run", "state", *numbers], told, right=numbers)


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--metric", "metrics", multiple=True, help="Show only these; may be repeated.")
@click.option(
    "--every",
    type=click.FloatRange(0.01, 3600),
    callback=number,
    default=0.5,
    show_default=True,
    help="Seconds between two looks.",
)
def watch(run: Path, metrics: tuple[str, ...], every: float) -> None:
    """Print the rows of RUN as they come, until it ends."""
    take_any_text()
    read(run)
    tail = Tail(run / "metrics.jsonl")
    while True:
        alive = is_running(run)  # before reading: rows of a run that ends meanwhile are not missed
        for line in filter(None, (_line(row, metrics) for row in tail.rows())):
            click.echo(line)
        if not alive:
            ended = read(run)
            click.echo(": ".join(filter(None, (str(run), ended.state, ended.error))))
            return
        time.sleep(every)


def _looked_at(folder: Path, metric: str) -> tuple[float, dict[str, object]]:
    """Return when a run started, and what to tell of it: a bad folder must not hide the others."""
    try:
        record = read(folder)
    except FundamentalError as error:
        click.echo(str(error), err=True)
        told = {"run": folder.name, "state": "unreadable", "error": str(error)}
        return 0.0, dict.fromkeys(TOLD) | told
    return record.started, _told(record, metric)


def _told(record: Record, metric: str) -> dict[str, object]:
    best, share = record.best(metric), record.share
    values = (
        record.name,
        record.state,
        record.step,
        None if share is None else f"{share:.0%}",
        best[1] if best else None,
        best[0] if best else None,
        _when(record.written),
        record.error,
    )
    return dict(zip(TOLD, values, strict=True))


def _when(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds")
    except (OverflowError, ValueError, OSError):  # a damaged row may say anything
        return None


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return str(value)


def _line(row: Row, metrics: tuple[str, ...]) -> str | None:
    chosen = {n: v for n, v in row.metrics.items() if not metrics or n in metrics}
    told = ", ".join(f"{name} {value:,.5g}" for name, value in chosen.items())
    return f"step {row.step}: {told}" if told else None
