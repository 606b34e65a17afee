"""Report the time of each phase and plugin of a run: as rows, as a table, and as a file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import attrs

from fundamentallm import write_durably
from fundamentallm_throughput.clock import PHASES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fundamentallm import Run
    from fundamentallm_throughput.clock import Key
    from fundamentallm_throughput.step_timer import StepTimer

FILE = "throughput.json"
FIRST = "first step"
OTHER = "other steps"
"""Extra time of the steps that were not timed hook by hook, of unknown origin."""
REST = "rest"
"""Time outside of hooks: the loop, and waiting for the device before a row of metrics."""
UNKNOWN = "unknown"
PLACES: dict[str, float] = {name: place for place, name in enumerate(PHASES)}
PLACES |= {FIRST: PLACES["data"] - 0.5, OTHER: PLACES["events"] + 0.5, REST: len(PHASES)}
ORDER = sorted(PLACES, key=PLACES.__getitem__)


@attrs.frozen
class Row:
    """The time of one plugin in one phase; ``share`` is its fraction of the whole time."""

    phase: str
    plugin: str
    seconds: float
    share: float


def rows(taken: Mapping[Key, float], wall: float) -> list[Row]:
    """Return the rows of ``wall`` seconds by phase, the plugin with the longest time first."""
    rest = {(REST, "core"): wall - sum(taken.values())}
    found = {key: seconds for key, seconds in {**taken, **rest}.items() if seconds > 0}
    total = sum(found.values())
    listed = [
        Row(phase, plugin, seconds, seconds / total) for (phase, plugin), seconds in found.items()
    ]
    return sorted(listed, key=lambda row: (PLACES[row.phase], -row.seconds, row.plugin))


def first_step(timer: StepTimer) -> dict[Key, float]:
    """Return the time of the first step by plugin; that of the loop is the core's."""
    taken: dict[Key, float] = {}
    for (_, plugin), seconds in timer.samples.first.items():
        taken[FIRST, plugin] = taken.get((FIRST, plugin), 0.0) + seconds
    left = (FIRST, "core" if taken else UNKNOWN)
    taken[left] = taken.get(left, 0.0) + max(timer.first_seconds - sum(taken.values()), 0.0)
    return taken


def other_steps(timer: StepTimer) -> dict[Key, float]:
    """Return the time of the other steps, estimated from the sampled ones.

    If the steps were quicker on average than the samples, all parts are scaled down. If they were
    slower, the rest has an unknown origin.
    """
    samples, factor = timer.samples, 0.0
    if samples.seconds > 0:
        factor = min((timer.steps - 1) / samples.weight, timer.step_seconds / samples.seconds)
    taken = {key: factor * seconds for key, seconds in samples.parts.items()}
    return taken | {(OTHER, UNKNOWN): timer.step_seconds - factor * samples.seconds}


def facts(run: Run, timer: StepTimer) -> dict[str, Any]:
    """Return the content of the file."""
    progress, wall = run.progress, timer.clock.now() - timer.began
    taken = timer.clock.seconds | first_step(timer) | other_steps(timer)
    return {
        "seconds": wall,
        "steps": progress.step - timer.first_step,
        "timed_steps": timer.samples.count,
        "tokens": progress.tokens - timer.first_tokens,
        "where": [attrs.asdict(row) for row in rows(taken, wall)],
    }


def table(facts: dict[str, Any]) -> str:
    """Return a line for each phase: its time, its share, and its plugins."""
    head = (
        f"where the time went: {facts['seconds']:.1f} s, {facts['steps']} steps, "
        f"{facts['timed_steps']} of them timed hook by hook"
    )
    lines = [head]
    for phase in ORDER:
        there = [row for row in facts["where"] if row["phase"] == phase]
        if there:
            seconds, share = (sum(row[key] for row in there) for key in ("seconds", "share"))
            shown = [row for row in there if row["share"] >= 0.0005] or there[:1]
            plugins = ", ".join(f"{row['plugin'] or 'wrapped'} {row['share']:.1%}" for row in shown)
            lines.append(f"  {phase:<12}{seconds:>10.2f} s {share:>7.1%}   {plugins}")
    return "\n".join(lines)


def write(path: Path, facts: dict[str, Any]) -> None:
    """Write the file durably."""
    write_durably(path, json.dumps(facts, indent=2) + "\n")
