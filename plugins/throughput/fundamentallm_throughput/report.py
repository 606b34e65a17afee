"""Where the time of a run went: as rows, as a table for people, and as a file."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import attrs

from fundamentallm_throughput.clock import PHASES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fundamentallm import Run
    from fundamentallm_throughput.clock import Key
    from fundamentallm_throughput.watch import Watch

FILE = "throughput.json"
FIRST = "first step"
OTHER = "other steps"
"""What the steps that were not timed inside took more than those that were: whose it is, is not
known."""
REST = "rest"
"""The loop itself, the host waiting for the device before a row of metrics, and whatever else
happens in no hook."""
UNKNOWN = "unknown"
PLACES: dict[str, float] = {name: place for place, name in enumerate(PHASES)}
PLACES |= {FIRST: PLACES["data"] - 0.5, OTHER: PLACES["events"] + 0.5, REST: len(PHASES)}
ORDER = sorted(PLACES, key=PLACES.__getitem__)


@attrs.frozen
class Row:
    """What one plugin took in one phase; ``share`` is of the whole time."""

    phase: str
    plugin: str
    seconds: float
    share: float


def rows(taken: Mapping[Key, float], wall: float) -> list[Row]:
    """Return who took what of ``wall`` seconds, by phase, and who took most first."""
    rest = {(REST, "core"): wall - sum(taken.values())}
    found = {key: seconds for key, seconds in {**taken, **rest}.items() if seconds > 0}
    total = sum(found.values())
    listed = [
        Row(phase, plugin, seconds, seconds / total) for (phase, plugin), seconds in found.items()
    ]
    return sorted(listed, key=lambda row: (PLACES[row.phase], -row.seconds, row.plugin))


def first_step(watch: Watch) -> dict[Key, float]:
    """Return what the first step took, by plugin; the loop's own share is the core's."""
    taken: dict[Key, float] = {}
    for (_, plugin), seconds in watch.samples.first.items():
        taken[FIRST, plugin] = taken.get((FIRST, plugin), 0.0) + seconds
    left = (FIRST, "core" if taken else UNKNOWN)
    taken[left] = taken.get(left, 0.0) + max(watch.first_seconds - sum(taken.values()), 0.0)
    return taken


def other_steps(watch: Watch) -> dict[Key, float]:
    """Return what the others took, as far as it can be told from those that were timed inside.

    These stand for all. Should the others have been quicker than that, all took that much less;
    should they have been slower, nobody knows why, and nobody is charged with it.
    """
    samples, factor = watch.samples, 0.0
    if samples.seconds > 0:
        factor = min((watch.steps - 1) / samples.weight, watch.step_seconds / samples.seconds)
    taken = {key: factor * seconds for key, seconds in samples.parts.items()}
    return taken | {(OTHER, UNKNOWN): watch.step_seconds - factor * samples.seconds}


def facts(run: Run, watch: Watch) -> dict[str, Any]:
    """Return what a finished run's file says."""
    progress, wall = run.progress, watch.clock.now() - watch.began
    taken = watch.clock.seconds | first_step(watch) | other_steps(watch)
    return {
        "seconds": wall,
        "steps": progress.step - watch.first_step,
        "timed_steps": watch.samples.count,
        "tokens": progress.tokens - watch.first_tokens,
        "where": [attrs.asdict(row) for row in rows(taken, wall)],
    }


def table(facts: dict[str, Any]) -> str:
    """Write a line per phase: its time, its share, and the plugins that took it."""
    head = (
        f"where the time went: {facts['seconds']:.1f} s, {facts['steps']} steps, "
        f"{facts['timed_steps']} of them timed inside"
    )
    lines = [head]
    for phase in ORDER:
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
