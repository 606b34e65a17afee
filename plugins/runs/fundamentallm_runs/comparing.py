"""The command ``compare``: what differs between runs, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import click

from fundamentallm import DataError, SettingsError
from fundamentallm_runs.curves import AXES, Axis, check_form, curve, drawn, write
from fundamentallm_runs.record import Record, read
from fundamentallm_runs.streams import number, take_any_text

FOLDER = click.Path(path_type=Path, file_okay=False)
ABSENT = "-"
UNJUDGED = ("optim/", "perf/", "system/", "train/tokens")  # no value is better than others


@attrs.frozen(kw_only=True)
class Look:
    """What to show of the runs."""

    metrics: tuple[str, ...]
    metric: str | None
    axis: Axis
    smooth: float
    output: Path | None


@click.command()
@click.argument("runs", type=FOLDER, nargs=-1, required=True)
@click.option("--metric", "metrics", multiple=True, help="Metrics to tabulate; may be repeated.")
@click.option("--curve", "metric", help="The metric to draw. [default: val/loss or train/loss]")
@click.option("--x", "axis", type=click.Choice(AXES), default="step", show_default=True)
@click.option(
    "--smooth",
    type=click.FloatRange(0, 1, max_open=True),
    callback=number,
    default=0.0,
    help="From 0 to below 1.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Also write a .png, .svg or .html file.",
)
def compare(runs: tuple[Path, ...], **chosen: Any) -> None:
    """Compare RUNS: settings that differ, last and best metrics, and curves."""
    from fundamentallm_runs.tables import console, show

    look = Look(**chosen)
    if look.output is not None:
        check_form(look.output)  # before much is read
    records = [read(folder) for folder in runs]
    names, known = _names(records), _known(records)
    for metric in (*look.metrics, *filter(None, [look.metric])):
        if known and metric not in known:
            raise _unknown(metric, known)
    take_any_text()
    screen = console(140)
    show(screen, ["setting", *names], _settings(records))
    show(screen, ["metric", *names], _metrics(records, look.metrics))
    if known:
        named = dict(zip(names, records, strict=False))  # a run that is given twice is one
        has_colours = screen.color_system is not None and not screen.no_color
        _draw(named, look, look.metric or _usual(known), has_colours)
    else:
        click.echo("no rows yet")


def _draw(records: dict[str, Record], look: Look, metric: str, colours: bool) -> None:
    both = ((name, curve(one, metric, look.axis, look.smooth)) for name, one in records.items())
    curves = [attrs.evolve(made, name=name) for name, made in both if made is not None]
    if not curves:
        told = f"{metric}: no finite value to draw"
        if look.output is not None:
            raise DataError(f"{told}; {look.output} is not written")
        click.echo(told)
        return
    click.echo(drawn(curves, metric, look.axis, colours=colours))
    if look.output is not None:
        write(look.output, curves, metric, look.axis)
        click.echo(f"written: {look.output}")


def flat(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting as its dotted name and its value, as text."""
    for name, value in tables.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            written = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield prefix + name, written


def differences(records: list[Record]) -> dict[str, list[str]]:
    """Return the settings that are not the same in all runs, each with its value in every one."""
    settings = [dict(flat(record.settings)) for record in records]
    names = dict.fromkeys(name for one in settings for name in one)
    values = {name: [one.get(name, ABSENT) for one in settings] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


def _names(records: list[Record]) -> list[str]:
    names = [record.name for record in records]
    return names if len(set(names)) == len(names) else [str(record.folder) for record in records]


def _settings(records: list[Record]) -> list[list[str]]:
    rows = [[name, *values] for name, values in differences(records).items()]
    return rows or [["all settings are the same", *[""] * len(records)]]


def _metrics(records: list[Record], chosen: tuple[str, ...]) -> list[list[str]]:
    rows = [
        ["state", *(record.state for record in records)],
        ["step", *(str(record.step) for record in records)],
    ]
    known = _known(records)
    for metric in chosen or [name for name in known if not name.startswith(("perf/", "system/"))]:
        rows.append([f"{metric} last", *(_number(record.last(metric)) for record in records)])
        if metric.startswith(UNJUDGED):
            continue
        bests = [record.best(metric) for record in records]
        told = [f"{best[1]:.6g} (step {best[0]})" if best else ABSENT for best in bests]
        rows.append([f"{metric} best", *told])
    return rows


def _unknown(metric: str, known: list[str]) -> SettingsError:
    told = ", ".join(known)
    return SettingsError(f"{metric}: none of the runs has logged it; known: {told}")


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.6g}"


def _known(records: list[Record]) -> list[str]:
    return sorted({name for record in records for name in record.columns.names})


def _usual(known: list[str]) -> str:
    return next((name for name in ("val/loss", "train/loss") if name in known), known[0])
