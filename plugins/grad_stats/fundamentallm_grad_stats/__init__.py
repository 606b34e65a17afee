"""Log norms of gradients and weights and the size of updates, by layer."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fundamentallm import Run, SettingsError, field, ge, hookimpl, optional, plugin, state
from fundamentallm_grad_stats import groups as naming

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from fundamentallm_grad_stats.norms import Weights

__all__ = ["GradStats"]

log = logging.getLogger("fundamentallm")

METRICS = 3
"""Per group."""


@plugin
class GradStats:
    """Log the norms of gradients and weights and the ratio of update to weights, by layer.

    Gradients are measured as they were applied: reduced, unscaled and clipped. It reads no device
    value in a step, and does nothing between the measured steps.
    """

    role = "observer"

    after: ClassVar[tuple[str, ...]] = (
        "freeze",
    )  # parameters that were just unfrozen are measured, too
    produces: ClassVar[tuple[str, ...]] = ("grad_norm/*", "weight_norm/*", "update_ratio/*")

    every: int | None = field(default=None, validator=optional(ge(1)))
    """Steps between two measurements; by default those of `run.log_every`, or 50 if that is no
    number of steps."""
    per: Literal["block", "module", "parameter"] = "block"
    """How to group parameters: by the name up to its first number (`blocks.3`), by module, or each
    parameter alone."""
    groups: dict[str, str] = field(factory=dict)
    """Groups in place of `per`: names, each with a pattern of parameter names. A parameter is in
    the first group that matches; those without one are the group `rest`."""
    max_keys: int = field(default=120, validator=ge(METRICS))
    """Largest number of metrics; if there were more, neighbouring groups are merged."""
    histograms: bool = False
    """Count the gradient values by size: in `grad_stats.jsonl` in the run folder, and for every
    logger that shows histograms."""

    pending: list[Any] = state(factory=list)
    """Histograms that are not yet written: step, groups, and counts on the device."""

    def __attrs_post_init__(self) -> None:
        for name in self.groups:
            if not re.fullmatch(r"[a-z0-9_][a-z0-9_.-]*", name) or name == naming.REST:
                raise ValueError(f"groups: {name!r} is no lower-case name, or is taken")
        if self.groups and METRICS * (len(self.groups) + 1) > self.max_keys:
            needed = METRICS * (len(self.groups) + 1)
            raise ValueError(f"max_keys: these groups and the rest make {needed} metrics")
        # Neither settings nor state.
        self._every = 1
        self._groups: dict[str, list[nn.Parameter]] = {}
        self._weights: Weights | None = None

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Sort the parameters into groups."""
        length = run.settings.log_every
        self._every = self.every or (int(length.amount) if length.unit == "steps" else 50)
        parameters = dict(run.model.named_parameters())
        self._groups = {
            group: [parameters[name] for name in names]
            for group, names in self._sorted(list(parameters)).items()
        }
        self._forget_later(run)

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        """Copy the weights if the step will be measured."""
        if not (run.progress.step + 1) % self._every:
            from fundamentallm_grad_stats.norms import Weights

            self._weights = Weights(self._groups)

    @hookimpl
    def settle_step(self, run: Run, applied: bool) -> None:
        """Measure the step if it changed the weights."""
        if self._weights is None:
            return
        weights, self._weights = self._weights, None
        norms = weights.norms() if applied else {}
        for name, value in norms.items():
            run.log(name, value)
        if norms and self.histograms:
            # In all processes: each may hold a part of the gradients.
            counted = weights.histograms()
            if run.rank == 0:
                # A new list: a snapshot may still refer to the old one.
                self.pending = [*self.pending, [run.progress.step, *counted]]

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Drop the histograms of the steps after the checkpoint."""
        self._forget_later(run)

    @hookimpl
    def on_log(self, run: Run) -> None:
        """Write the histograms, and emit their sums since the last row as ``on_histogram``."""
        if not self.histograms:
            return
        # An error must mute this observer in all processes: they would wait for one that is muted.
        sums = run.from_first(lambda: self._write(run))
        for group, counts in sums.items() if run.rank == 0 else ():
            self._emit(run, f"{run.name_of(self)}/{group}", tuple(counts))

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        """Write the histograms that were not logged because of a signal."""
        if run.rank == 0:
            self._write(run)

    def _emit(self, run: Run, name: str, counts: tuple[int, ...]) -> None:
        from fundamentallm_grad_stats.norms import EXPONENTS

        step = run.progress.step
        run.hook.on_histogram(run=run, name=name, step=step, edges=EXPONENTS, counts=counts)

    def _sorted(self, names: list[str]) -> dict[str, list[str]]:
        if self.groups:
            found = naming.matched(names, self.groups)
            for group, pattern in self.groups.items():
                if not found[group]:
                    known = f"there are {len(names)}, such as {', '.join(names[:3])}"
                    text = f"{pattern!r} matches no remaining parameter; {known}"
                    raise SettingsError(f"grad_stats.groups.{group}: {text}")
            return found
        found = naming.grouped(names, self.per)
        most = self.max_keys // METRICS
        if len(found) > most:
            log.warning(
                "grad_stats: %d groups would make more than %d metrics: neighbours are merged",
                len(found),
                self.max_keys,
            )
        return naming.merged(found, most)

    def _write(self, run: Run) -> dict[str, list[int]]:
        """Write the histograms, and return their sums by group."""
        if not self.pending:
            return {}
        from fundamentallm_grad_stats import lines, norms

        pending, self.pending = self.pending, []
        rows, sums = [], dict[str, list[int]]()
        for step, names, counts in pending:
            found = dict(zip(names, counts.tolist(), strict=True))
            rows.append({"step": step, "edges": norms.EDGES, "counts": found})
            for group, new in found.items():
                sums[group] = [*map(sum, zip(new, sums.get(group, [0] * len(new)), strict=True))]
        lines.append(self._path(run), rows)
        return sums

    def _forget_later(self, run: Run) -> None:
        step = run.progress.step
        self.pending = [kept for kept in self.pending if kept[0] <= step]
        if self.histograms and run.rank == 0:
            from fundamentallm_grad_stats import lines

            # A killed process may have written the pending ones already.
            last = min([step, *(kept[0] - 1 for kept in self.pending)])
            lines.drop_after(last, self._path(run))

    def _path(self, run: Run) -> Path:
        return run.folder / f"{run.name_of(self)}.jsonl"
