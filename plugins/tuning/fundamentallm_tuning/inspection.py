"""A run in small: built, trained for some steps, validated, saved and restored."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

from fundamentallm import Composed, FundamentalError, Period, StorageError, train
from fundamentallm_tuning import findings
from fundamentallm_tuning.digests import restored_from_memory
from fundamentallm_tuning.estimate import Plan, estimated
from fundamentallm_tuning.probe import Comparison, Probe
from fundamentallm_tuning.trial import answers, ended, follows, reduced, scratch


def inspect(composed: Composed, again: Composed, steps: int) -> Iterator[str]:
    """Yield the lines of the report; raise the error that the run ends with, if it does.

    ``again`` are the same settings, composed once more: a run needs plugins of its own.
    """
    left_out = [name for name, one in composed.plugins.items() if follows(one)]
    yield from findings.taking_part(composed, left_out)
    probe, plan = Probe(steps=steps), Plan.of(composed)
    with scratch() as folder:
        for settings in (composed, again):
            _divert(settings, folder, steps)
        try:
            different, how = _saved_and_restored(composed, again, probe, folder)
        except FundamentalError:
            yield from findings.all_of(probe)  # as far as it came
            raise
    yield from findings.all_of(probe)
    yield from estimated(plan, probe)
    yield from _compared(different, how)
    notes = findings.notes(probe)
    yield from (f"note: {note}" for note in notes)
    yield "nothing wrong was found" + (", but see the notes" if notes else "")


def _divert(composed: Composed, folder: Path, steps: int) -> None:
    """Let what saves do it once, in the temporary folder."""
    for name, one in composed.plugins.items():
        if answers(one, "read_checkpoint"):
            if isinstance(getattr(one, "folder", None), Path):
                one.folder = folder / f"elsewhere-{name}"
            if isinstance(getattr(one, "every", None), Period):
                one.every = Period(steps)


def _saved_and_restored(
    composed: Composed, again: Composed, probe: Probe, folder: Path
) -> tuple[list[str], str]:
    """Train and restore; return the paths in the snapshot that differ, and the way it was done."""
    different = _trained(composed, probe, folder)
    if different is not None:
        return different, "from a copy in memory, for there is no checkpoint to resume from"
    gc.collect()  # the first run's model, before there is a second one
    _free_device(probe.device)
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


def _free_device(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def _compared(different: list[str], how: str) -> Iterator[str]:
    if not different:
        yield findings.line("restore", f"{how}: weights, optimizer, plugins and random state are "
                                       f"bit for bit what they were")  # fmt: skip
        return
    shown = ", ".join(different[:5]) + (f" and {len(different) - 5} more" if different[5:] else "")
    raise StorageError(f"restored {how}, these are not bit for bit what they were: {shown}")
