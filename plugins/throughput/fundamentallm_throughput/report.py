"""Where the time of a run went: as rows, as a table for people, and as a file."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import attrs

from fundamentallm_throughput.clock import BETWEEN, PHASES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fundamentallm import Run
    from fundamentallm_throughput.watch import Watch

FILE = "throughput.json"
REST = "rest"
"""The loop itself, the host waiting for the device before a row of metrics, and whatever else
happens in no hook."""


@attrs.frozen
class Row:
    """What one plugin took in one phase; ``share`` is of the whole time."""

    phase: str
    plugin: str
    seconds: float
    share: float


def rows(timed: Mapping[tuple[str, str], float], factor: float, wall: float) -> list[Row]:
    """Return who took what of ``wall`` seconds, by phase, and who took most first.

    ``timed`` are seconds by phase and plugin; those inside of steps were timed in some steps alone,
    and are taken ``factor`` times.
    """
    taken = {key: seconds * (1.0 if key[0] in BETWEEN else factor)
             for key, seconds in timed.items()}  # fmt: skip
    taken[REST, "core"] = max(wall - sum(taken.values()), 0.0)
    order = {phase: index for index, phase in enumerate((*PHASES, REST))}
    total = sum(taken.values())
    found = [Row(*key, seconds, seconds / total) for key, seconds in taken.items() if seconds]
    return sorted(found, key=lambda row: (order[row.phase], -row.seconds, row.plugin))


def facts(run: Run, watch: Watch) -> dict[str, Any]:
    """Return what a finished run's file says."""
    progress, wall = run.progress, watch.clock.now() - watch.began
    factor = watch.step_seconds / watch.sampled_seconds if watch.sampled_steps else 0.0
    return {
        "seconds": wall,
        "steps": progress.step - watch.first_step,
        "timed_steps": watch.sampled_steps,
        "tokens": progress.tokens - watch.first_tokens,
        "where": [attrs.asdict(row) for row in rows(watch.clock.seconds, factor, wall)],
    }


def table(facts: dict[str, Any]) -> str:
    """Write a line per phase: its time, its share, and the plugins that took it."""
    head = (f"where the time went: {facts['seconds']:.1f} s, {facts['steps']} steps, "
            f"{facts['timed_steps']} of them timed inside")  # fmt: skip
    lines = [head]
    for phase in (*PHASES, REST):
        there = [row for row in facts["where"] if row["phase"] == phase]
        if there:
            seconds, share = (sum(row[key] for row in there) for key in ("seconds", "share"))
            shown = [row for row in there if row["share"] >= 0.0005] or there[:1]
            who = ", ".join(f"{row['plugin'] or 'wrapped'} {row['share']:.1%}" for row in shown)
            lines.append(f"  {phase:<12}{seconds:>10.2f} s {share:>7.1%}   {who}")
    return "\n".join(lines)


def write(path: Path, facts: dict[str, Any]) -> None:
    """Write the file, whole or not at all."""
    beside = path.with_name(f".{path.name}")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(facts, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
