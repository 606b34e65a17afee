"""Compare runs: settings that differ, last and best metrics, curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import attrs

from fundamentallm import DataError, SettingsError, flatten
from fundamentallm_runs.curves import Axis, check_form, curve, drawn, write
from fundamentallm_runs.list_runs import described
from fundamentallm_runs.run_record import Record, read

ABSENT = "-"
UNJUDGED = ("optim/", "perf/", "system/", "train/tokens")  # no value is better than another


@attrs.frozen(kw_only=True)
class Chosen:
    """The options of the command."""

    metrics: tuple[str, ...]
    metric: str | None
    axis: Axis
    smooth: float
    output: Path | None


def compare_runs(
    folders: Sequence[Path], chosen: Chosen, show_line: Callable[[str], object]
) -> None:
    """Print the tables and the curves of some runs; write the picture if one is chosen."""
    from fundamentallm_runs.tables import console, show

    if chosen.output is not None:
        check_form(chosen.output)  # before the runs are read
    records = [read(path) for path in folders]
    names, known = _names(records), _known(records)
    for metric in (*chosen.metrics, *filter(None, [chosen.metric])):
        if known and metric not in known:
            raise _unknown(metric, known)
    screen = console(140)
    show(screen, ["setting", *names], _settings(records))
    show(screen, ["metric", *names], _metrics(records, chosen.metrics))
    if known:
        named = dict(zip(names, records, strict=False))  # a run that is given twice is one
        colours = screen.color_system is not None and not screen.no_color
        lines = _draw(named, chosen, chosen.metric or _usual(known), colours)
    else:
        lines = []
    for name, record in zip(names, records, strict=True):
        lines += [f"{name}: {record.lacks_rows}"] if record.lacks_rows else []
    for line in dict.fromkeys(lines):
        show_line(line)


def _draw(records: dict[str, Record], chosen: Chosen, metric: str, colours: bool) -> list[str]:
    """Return the drawing; write the picture."""
    both = ((name, curve(one, metric, chosen.axis, chosen.smooth)) for name, one in records.items())
    curves = [attrs.evolve(made, name=name) for name, made in both if made is not None]
    if not curves:
        text = f"{metric}: no finite value to draw"
        if chosen.output is not None:
            raise DataError(f"{text}; {chosen.output} is not written")
        return [text]
    lines = [drawn(curves, metric, chosen.axis, colours=colours)]
    if chosen.output is not None:
        write(chosen.output, curves, metric, chosen.axis)
        lines.append(f"written: {chosen.output}")
    return lines


def differences(records: list[Record]) -> dict[str, list[str]]:
    """Return the settings that differ between the runs, each with its value in every run."""
    settings = [
        {
            name: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            for name, value in flatten(record.settings).items()
        }
        for record in records
    ]
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
        ["state", *(described(record) for record in records)],
        ["step", *(str(record.step) for record in records)],
    ]
    known = _known(records)
    for metric in chosen or [name for name in known if not name.startswith(("perf/", "system/"))]:
        rows.append([f"{metric} last", *(_number(record.last(metric)) for record in records)])
        if metric.startswith(UNJUDGED):
            continue
        bests = [record.best(metric) for record in records]
        shown = [f"{best[1]:.6g} (step {best[0]})" if best else ABSENT for best in bests]
        rows.append([f"{metric} best", *shown])
    return rows


def _unknown(metric: str, known: list[str]) -> SettingsError:
    text = f"{metric}: none of the runs has logged it; known: {', '.join(known)}"
    return SettingsError(text)


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.6g}"


def _known(records: list[Record]) -> list[str]:
    return sorted({name for record in records for name in record.columns.names})


def _usual(known: list[str]) -> str:
    return next((name for name in ("val/loss", "train/loss") if name in known), known[0])
