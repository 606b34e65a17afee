"""Find the largest batch size that fits into memory, and the one that trains fastest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fundamentallm import Composed, OutOfMemoryError, SettingsError, answering, setting_fields
from fundamentallm_tuning.batch_size_worker import Measured, Request, measure
from fundamentallm_tuning.trial import scratch
from fundamentallm_tuning.units import duration, size

FAST_ENOUGH = 0.98
"""Fraction of the highest speed: the smallest batch size that reaches it is suggested, because a
larger one for the last 2 % is not worth its memory."""
ACCUMULATE = "accumulate"
"""The plugin to add where a step needs several micro-batches and no listed plugin makes them."""


class StepSettings(NamedTuple):
    """The settings that determine the size of a step."""

    data: str
    batch_size: int
    accumulates: str | None
    microbatches: int

    @classmethod
    def of(cls, composed: Composed) -> StepSettings:
        """Find them; raise ``SettingsError`` if the plugin of the data has no batch size."""
        data = answering(composed.plugins, "build_data") or ""
        batch_size = _whole(composed.plugins[data], "batch_size")
        if batch_size is None:
            known = ", ".join(setting_fields(type(composed.plugins[data]))) or "none"
            raise SettingsError(
                f"{data}: has no setting 'batch_size' that is a whole number, which this "
                f"command needs; its settings: {known}"
            )
        name = answering(composed.plugins, "collect_batches")
        count = _whole(composed.plugins[name], "microbatches") if name else None
        return cls(data, batch_size, name if count else None, count or 1)

    @property
    def step_size(self) -> int:
        """Number of samples in a step."""
        return self.batch_size * self.microbatches

    def sizes(self, low: int, high: int, *, keeps: bool) -> Sequence[int]:
        """Return the batch sizes to choose from; with ``keeps``, the divisors of the step size."""
        if not keeps:
            return range(low, high + 1)
        found = [n for n in range(low, min(high, self.step_size) + 1) if not self.step_size % n]
        if not found:
            raise SettingsError(
                f"a step has {self.step_size} samples, {self.data}.batch_size times the "
                f"micro-batches: no batch size from {low} to {high} divides that"
            )
        return found

    def choice(
        self, made: Mapping[str, Sequence[str]], batch_size: int, *, keeps: bool
    ) -> Mapping[str, Sequence[str]]:
        """Return the options ``made`` on the command line with the changes of a trial."""
        overrides = [*made["overrides"], f"{self.data}.batch_size={batch_size}"]
        add, count = list(made["add"]), self.microbatches
        if keeps:
            count = self.step_size // batch_size
        if not self.accumulates and count > 1:
            add.append(ACCUMULATE)
        if self.accumulates or count > 1:
            # From the second micro-batch on, the gradients are in memory as well. A third one would
            # add only time.
            overrides.append(f"{self.accumulates or ACCUMULATE}.microbatches={min(count, 2)}")
        return {**made, "overrides": overrides, "add": add}

    def setting(self, batch_size: int, *, keeps: bool) -> list[str]:
        """Return the lines to paste into the settings."""
        lines = [f"[{self.data}]", f"batch_size = {batch_size}"]
        count = self.step_size // batch_size
        if not keeps or (count == self.microbatches == 1):
            return lines
        missing = [] if self.accumulates else [f'# add "{ACCUMULATE}" to the plugins list']
        return [
            *lines,
            "",
            *missing,
            f"[{self.accumulates or ACCUMULATE}]",
            f"microbatches = {count}",
        ]


def find(
    composed: Composed, request: Request, show: Callable[[str], object], *, keeps_step_size: bool
) -> None:
    """Try sizes and suggest one; ``show`` every line of the report when it is known."""
    step, tried = StepSettings.of(composed), dict[int, Measured]()
    sizes = step.sizes(request.low, request.high, keeps=keeps_step_size)
    show(f"{'batch_size':>10}  {'tokens/s':>10}  {'step':>12}  {'peak memory':>12}")
    with scratch() as folder:

        def fits(batch_size: int) -> bool:
            choice = step.choice(request.choice, batch_size, keeps=keeps_step_size)
            trial = tried[batch_size] = measure(request, choice, folder)
            show(_row(batch_size, trial))
            if trial.code not in (0, OutOfMemoryError.exit_code) and len(tried) == 1:
                raise trial.failure()
            return not trial.code

        largest = largest_that_fits(sizes, fits)
    if largest is None:
        raise OutOfMemoryError(
            f"not even {step.data}.batch_size = {sizes[0]} fits into memory: "
            f"{tried[sizes[0]].error}"
        )
    fastest = fastest_of({n: trial.speed for n, trial in tried.items() if not trial.code})
    for line in ("", *_suggested(step, fastest, largest, at_the_end=largest == sizes[-1])):
        show(line)
    for line in ("", *step.setting(fastest, keeps=keeps_step_size)):
        show(line)


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the largest of the increasing ``sizes`` that is known to fit; None if the first does
    not. Doubles the size until one does not fit, then bisects, down to a sixteenth."""
    at, beyond = -1, len(sizes)
    while at + 1 < beyond:
        reach = 2 * sizes[at] if at >= 0 else sizes[0]
        following = bisect_left(sizes, reach, at + 1, len(sizes) - 1)
        if fits(sizes[following]):
            at = following
        else:
            beyond = following
            break
    while at >= 0 and beyond - at > 1 and sizes[beyond] - sizes[at] > sizes[at] // 16:
        middle = (at + beyond) // 2
        at, beyond = (middle, beyond) if fits(sizes[middle]) else (at, middle)
    return sizes[at] if at >= 0 else None


def fastest_of(speeds: Mapping[int, float]) -> int:
    """Return the smallest batch size that is about as fast as the fastest."""
    best = max(speeds.values())
    return min(size for size, speed in speeds.items() if speed >= FAST_ENOUGH * best)


def _suggested(step: StepSettings, fastest: int, largest: int, *, at_the_end: bool) -> list[str]:
    limit = "the largest allowed" if at_the_end else "the largest found to fit"
    return [
        f"fastest: {fastest} (the smallest within {1 - FAST_ENOUGH:.0%} of the highest speed)",
        f"{limit}: {largest}; the settings have {step.batch_size}",
    ]


def _row(batch_size: int, trial: Measured) -> str:
    if trial.code:
        what = "does not fit" if trial.code == OutOfMemoryError.exit_code else "fails"
        return f"{batch_size:>10}  {what}: {trial.error.splitlines()[0]}"
    return (
        f"{batch_size:>10}  {trial.speed:>10,.0f}  {duration(trial.seconds):>12}  "
        f"{size(trial.peak):>12}"
    )


def _whole(instance: Any, name: str) -> int | None:
    """Return a setting of a plugin if it is a whole number, else None."""
    value = getattr(instance, name, None)
    there = name in setting_fields(type(instance))
    return value if there and isinstance(value, int) and not isinstance(value, bool) else None
