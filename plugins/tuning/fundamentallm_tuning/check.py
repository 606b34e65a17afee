"""Run settings in small: build, train some steps, validate, save and restore."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from fundamentallm import (
    Composed,
    FundamentalError,
    OutOfMemoryError,
    Period,
    StorageError,
    train,
)
from fundamentallm_tuning.digests import restored_from_memory
from fundamentallm_tuning.estimate import Plan
from fundamentallm_tuning.extrapolate import StepSample, may_change, total_of
from fundamentallm_tuning.probe import Comparison, Probe
from fundamentallm_tuning.trial import ended, follows, reduced, saves, scratch, setting


@attrs.frozen
class Restored:
    """What was restored after the steps of the trial, and how it compares with what was saved."""

    step: int | None
    """The step of the checkpoint; None if a copy in memory was restored."""
    different: list[str] = attrs.field(factory=list)
    """Paths in the snapshot whose values are not bit-identical."""
    other_data: bool = False
    """Whether the resumed run reads another next micro-batch than the run that was not stopped."""


@attrs.define
class CheckResult:
    """What a check found; ``error`` is set where the trial run failed, and the rest is partial."""

    plan: Plan
    probe: Probe
    samples: list[StepSample] = attrs.field(factory=list)
    """Typical steps at one or several points of the run."""
    untried: str | None = None
    """Why later steps could not be tried."""
    restored: Restored | None = None
    error: FundamentalError | None = None


def check_settings(compose: Callable[[], Composed], steps: int) -> CheckResult:
    """Run the trial. ``compose`` makes the settings: every run needs plugins of its own."""
    composed, again = compose(), compose()
    result = CheckResult(Plan.of(composed), Probe(steps=steps))
    with scratch() as folder:
        for settings in (composed, again):
            _divert(settings, folder, steps)
        try:
            result.restored = _save_and_restore(composed, again, result.probe, folder)
            _try_later_steps(compose, result, folder)
        except FundamentalError as error:
            result.error = error
    return result


def _divert(composed: Composed, folder: Path, steps: int) -> None:
    """Make savers save once, in the temporary folder. Make periodic validation happen twice, since
    the first one may compile."""
    if composed.run.validate_every is not None:
        composed.run.validate_every = Period(max(steps - 1, 1))
    for name, one in composed.plugins.items():
        if saves(one):
            if setting(one, "folder", Path) is not None:
                one.folder = folder / f"elsewhere-{name}"
            if setting(one, "every", Period) is not None:
                one.every = Period(steps)


def _try_later_steps(compose: Callable[[], Composed], result: CheckResult, folder: Path) -> None:
    """Sample the steps at some points of the run: one if they never change, else up to three.

    Short runs begin at the end and in the middle, as if all steps before had been trained.
    """
    plan, probe = result.plan, result.probe
    result.samples = [StepSample.of(probe, 0.0)]
    if result.samples[0].amount(plan.length, probe.epoch_samples) * probe.steps >= 1:
        return
    if not may_change(compose()):
        return
    try:
        for at in (1.0, 0.5):
            later = Probe(steps=probe.steps, passed=_position(plan, probe, result.samples, at))
            _train_only(compose(), later, folder / f"at-{at}")
            probe.sizes |= {
                name: max(count, probe.sizes[name]) for name, count in later.sizes.items()
            }
            sample = StepSample.of(later, at)
            if len(result.samples) == 1 and sample.alike(result.samples[0]):
                break
            result.samples = sorted([*result.samples, sample])
    except OutOfMemoryError as error:
        error.add_note(f"that was after {at:.0%} of the run; its first steps do fit")
        raise
    except FundamentalError as error:
        result.untried = str(error).splitlines()[0]


def _position(plan: Plan, probe: Probe, samples: list[StepSample], at: float) -> dict[str, Any]:
    """Return the counts of the progress at some point of the run; at its end, a trial earlier."""
    epoch = probe.epoch_samples
    trial = probe.steps * samples[0].amount(plan.length, epoch)
    total = total_of(plan.length, samples, epoch, min(at, 1 - trial))
    steps, count, tokens = (round(number) for number in (total.steps, total.samples, total.tokens))
    return {
        "step": steps,
        "applied": steps,
        "microbatches": steps * probe.counts["microbatches"],
        "samples": count,
        "tokens": tokens,
        "seconds": total.seconds,
        "before": (count, tokens, total.seconds),
    }


def _train_only(composed: Composed, probe: Probe, folder: Path) -> None:
    """Train the steps of a trial without comparing anything afterwards."""
    _divert(composed, folder, probe.steps)
    _free_memory()
    ended(train(reduced(composed, _takes_part, probe), run_dir=folder / "run"))


def _save_and_restore(composed: Composed, again: Composed, probe: Probe, folder: Path) -> Restored:
    """Train, save, restore; raise ``StorageError`` unless all is as it was."""
    restored = _trained(composed, probe, folder)
    if restored is None:
        _free_memory()  # the first run's model, before there is a second one
        comparison = Comparison()
        comparison.expected, comparison.next_batch = probe.state, probe.next_batch
        ended(train(reduced(again, _takes_part, comparison), run_dir=folder / "run"))
        other_data = comparison.other_data
        restored = Restored(len(probe.losses), comparison.different, other_data)
    if restored.different or restored.other_data:
        raise StorageError(mismatch(restored))
    return restored


def _trained(composed: Composed, probe: Probe, folder: Path) -> Restored | None:
    """Train; where no checkpoint can be resumed from, restore from memory at once."""
    run = ended(train(reduced(composed, _takes_part, probe), run_dir=folder / "run"))
    savers = [one for one in run.plugins.values() if saves(one)]
    if probe.saved and any(setting(one, "contents", str) in (None, "all") for one in savers):
        return None
    return Restored(None, restored_from_memory(run))


def mismatch(restored: Restored) -> str:
    """Return the error about a state that was not restored as it was."""
    if restored.different:
        shown = ", ".join(restored.different[:5])
        more = f" and {len(restored.different) - 5} more" if restored.different[5:] else ""
        return f"restored {source(restored)}, these are not bit-identical: {shown}{more}"
    return (
        f"restored {source(restored)}, the next micro-batch is not that of a run that was not "
        "stopped: the data source must continue from `progress.samples`, and its order must not "
        "come from torch's global generator. The usual cause is a DataLoader with `shuffle=True` "
        "and without `generator=`; draw the order from the seed and the sample index instead"
    )


def source(restored: Restored) -> str:
    """Return where the state was restored from."""
    if restored.step is None:
        return "from a copy in memory, for there is no checkpoint to resume from"
    return f"from the checkpoint of step {restored.step}"


def _takes_part(instance: object) -> bool:
    return not follows(instance)


def _free_memory() -> None:
    """Free the memory of an earlier run, and what was compiled for it."""
    import torch

    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
