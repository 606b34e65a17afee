"""The commands ``runs`` and ``watch``: what is there, and what is going on."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path

import click

from fundamentallm import StorageError
from fundamentallm_runs.record import Record, is_run, is_running, read
from fundamentallm_runs.rows import Row, parsed

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.argument("folder", type=FOLDER, default=Path("runs"))
@click.option("--metric", default="val/loss", show_default=True, help="Whose best value to show.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def runs(folder: Path, metric: str, as_json: bool) -> None:
    """List the runs in FOLDER (by default runs/), the newest last."""
    if not folder.is_dir():
        raise StorageError(f"{folder}: there is no such folder")
    found = [read(inner) for inner in sorted(folder.iterdir()) if is_run(inner)]
    found.sort(key=lambda record: record.environment.get("started", 0.0))
    rows = [_told(record, metric) for record in found]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        click.echo(f"{folder}: no runs")
        return
    from fundamentallm_runs.tables import console, table

    shown = table("run", "state")
    for name in ("step", "done", f"best {metric}", "at step", "last row"):
        shown.add_column(name, justify="right")
    for row in rows:
        shown.add_row(*map(_shown, row.values()))
    console(120).print(shown)


@click.command()
@click.argument("run", type=FOLDER)
@click.option("--metric", "metrics", multiple=True, help="Show only these; may be repeated.")
@click.option("--every", default=0.5, show_default=True, help="Seconds between two looks.")
def watch(run: Path, metrics: tuple[str, ...], every: float) -> None:
    """Print the rows of RUN as they come, until it ends."""
    read(run)
    path, position, rest = run / "metrics.jsonl", 0, b""
    while True:
        alive = is_running(run)  # before reading: rows of a run that ends meanwhile are not missed
        if path.exists() and path.stat().st_size < position:  # a resumed run has cut the file
            position, rest = 0, b""
        new = _after(path, position)
        position += len(new)
        *lines, rest = (rest + new).split(b"\n")
        for row in filter(None, map(parsed, lines)):
            click.echo(_line(row, metrics))
        if not alive:
            click.echo(f"{run}: {read(run).state}")
            return
        time.sleep(every)


def _after(path: Path, position: int) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(position)
        return file.read()


def _told(record: Record, metric: str) -> dict[str, object]:
    best, share, last = record.best(metric), record.share, record.written
    written = None if last is None else datetime.fromtimestamp(last, UTC)
    return {
        "run": record.name,
        "state": record.state,
        "step": record.step,
        "done": None if share is None else f"{share:.0%}",
        "best": best[1] if best else None,
        "best_step": best[0] if best else None,
        "written": written.isoformat(" ", "seconds") if written else None,
    }


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return str(value)


def _line(row: Row, metrics: tuple[str, ...]) -> str:
    chosen = {n: v for n, v in row.metrics.items() if not metrics or n in metrics}
    told = ", ".join(f"{name} {value:,.5g}" for name, value in chosen.items())
    return f"step {row.step}: {told}"
