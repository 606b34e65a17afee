"""A run in small: built, trained for some steps, validated, saved and restored."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fundamentallm import (
    Composed,
    FundamentalError,
    OutOfMemoryError,
    Period,
    StorageError,
    train,
)
from fundamentallm_tuning import findings
from fundamentallm_tuning.digests import restored_from_memory
from fundamentallm_tuning.estimate import Plan, estimated
from fundamentallm_tuning.points import Point, may_change, passed
from fundamentallm_tuning.probe import Comparison, Probe
from fundamentallm_tuning.trial import answers, ended, follows, reduced, scratch


def inspect(compose: Callable[[], Composed], steps: int) -> Iterator[str]:
    """Yield the lines of the report; raise the error that the run ends with, if it does.

    ``compose`` makes the settings: every run needs plugins of its own.
    """
    composed = compose()
    left_out = [name for name, one in composed.plugins.items() if follows(one)]
    yield from findings.taking_part(composed, left_out)
    probe, plan = Probe(steps=steps), Plan.of(composed)
    with scratch() as folder:
        again = compose()
        for settings in (composed, again):
            _divert(settings, folder, steps)
        try:
            different, how = _saved_and_restored(composed, again, probe, folder)
            points, untried = _all_along(compose, plan, probe, folder)
        except FundamentalError:
            yield from findings.all_of(probe)  # as far as it came
            raise
    yield from findings.all_of(probe)
    yield from estimated(plan, probe, points)
    yield from _compared(different, how)
    notes = findings.notes(probe) + untried
    yield from (f"note: {note}" for note in notes)
    yield "nothing wrong was found" + (", but see the notes" if notes else "")


def _divert(composed: Composed, folder: Path, steps: int) -> None:
    """Let what saves do it once, in the temporary folder, and what is validated often be so twice:
    the first time may compile."""
    if composed.run.validate_every is not None:
        composed.run.validate_every = Period(max(steps - 1, 1))
    for name, one in composed.plugins.items():
        if answers(one, "read_checkpoint"):
            if isinstance(getattr(one, "folder", None), Path):
                one.folder = folder / f"elsewhere-{name}"
            if isinstance(getattr(one, "every", None), Period):
                one.every = Period(steps)


def _all_along(
    compose: Callable[[], Composed], plan: Plan, probe: Probe, folder: Path
) -> tuple[list[Point], list[str]]:
    """Return what steps are like at some points of the run, and notes on what could not be tried.

    A run that stays as it begins has one point. Else there are short runs that begin at the end
    and in the middle, as if so much had been trained.
    """
    points = [Point.of(probe, 0.0)]
    if points[0].amount(plan.length, probe.epoch_samples) * probe.steps >= 1:
        return points, []
    if not may_change(compose()):
        return points, []
    try:
        for at in (1.0, 0.5):
            later = Probe(steps=probe.steps, passed=_position(plan, probe, points, at))
            _made(compose(), later, folder / f"at-{at}")
            probe.sizes |= {
                name: max(count, probe.sizes[name]) for name, count in later.sizes.items()
            }
            point = Point.of(later, at)
            if len(points) == 1 and point.alike(points[0]):
                break
            points = sorted([*points, point])
    except OutOfMemoryError as error:
        error.add_note(f"that was after {at:.0%} of the run; its first steps do fit")
        raise
    except FundamentalError as error:
        why = str(error).splitlines()[0]
        return points, [f"time and memory are those of the first steps; later ones fail: {why}"]
    return points, []


def _position(plan: Plan, probe: Probe, points: list[Point], at: float) -> dict[str, Any]:
    """Return the counts of a progress of which a part is behind it: at the end, all but a trial."""
    epoch = probe.epoch_samples
    trial = probe.steps * points[0].amount(plan.length, epoch)
    total = passed(plan.length, points, epoch, min(at, 1 - trial))
    steps, samples, tokens = (round(count) for count in total[:3])
    return {
        "step": steps,
        "applied": steps,
        "microbatches": steps * probe.counts["microbatches"],
        "samples": samples,
        "tokens": tokens,
        "seconds": total.seconds,
        "before": (samples, tokens, total.seconds),
    }


def _made(composed: Composed, probe: Probe, folder: Path) -> None:
    """Make the steps of a trial that nothing is compared with."""
    _divert(composed, folder, probe.steps)
    _forget()
    ended(train(reduced(composed, _takes_part, probe), run_dir=folder / "run"))


def _saved_and_restored(
    composed: Composed, again: Composed, probe: Probe, folder: Path
) -> tuple[list[str], str]:
    """Train and restore; return the paths in the snapshot that differ, and the way it was done."""
    different = _trained(composed, probe, folder)
    if different is not None:
        return different, "from a copy in memory, for there is no checkpoint to resume from"
    _forget()  # the first run's model, before there is a second one
    comparison = Comparison()
    comparison.expected = probe.state
    ended(train(reduced(again, _takes_part, comparison), run_dir=folder / "run"))
    return comparison.different, f"from the checkpoint of step {len(probe.losses)}"


def _trained(composed: Composed, probe: Probe, folder: Path) -> list[str] | None:
    """Train; where no checkpoint can be resumed from, restore from memory at once."""
    run = ended(train(reduced(composed, _takes_part, probe), run_dir=folder / "run"))
    saves = [one for one in run.plugins.values() if answers(one, "read_checkpoint")]
    if probe.saved and any(getattr(one, "contents", "all") == "all" for one in saves):
        return None
    return restored_from_memory(run)


def _takes_part(instance: object) -> bool:
    return not follows(instance)


def _forget() -> None:
    """Give back what a run has left in memory, and what was compiled for it."""
    import torch

    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _compared(different: list[str], how: str) -> Iterator[str]:
    if not different:
        yield findings.line(
            "restore",
            f"{how}: weights, optimizer, plugins and random state are bit for bit what they were",
        )
        return
    shown = ", ".join(different[:5]) + (f" and {len(different) - 5} more" if different[5:] else "")
    raise StorageError(f"restored {how}, these are not bit for bit what they were: {shown}")
