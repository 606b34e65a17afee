"""How large gradients and weights are, and how far each update goes, layer by layer."""

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

    Gradients are measured as they were applied: reduced, unscaled and clipped. Nothing here makes
    the host wait for the device; between the measured steps nothing is done.
    """

    role = "observer"

    after: ClassVar[tuple[str, ...]] = ("freeze",)  # what has just been unfrozen is measured, too
    produces: ClassVar[tuple[str, ...]] = ("grad_norm/*", "weight_norm/*", "update_ratio/*")

    every: int | None = field(default=None, validator=optional(ge(1)))
    """Steps from one measurement to the next; by default those of `run.log_every`, or 50 where
    that is no number of steps."""
    per: Literal["block", "module", "parameter"] = "block"
    """What is measured together: all up to the first number in a parameter's name
    (`blocks.3`), a module's own parameters, or each parameter alone."""
    groups: dict[str, str] = field(factory=dict)
    """Instead of that, groups of your own: a name, and the pattern of its parameters' names. A
    parameter is in the first that matches; those that match none are the group `rest`."""
    max_keys: int = field(default=120, validator=ge(METRICS))
    """The most metrics to log; where there would be more, neighbouring groups are put together."""
    histograms: bool = False
    """Count how many gradient values have which size: in `grad_stats.jsonl` in the run folder, and
    for every logger that shows histograms."""

    pending: list[Any] = state(factory=list)
    """Histograms that are not written yet: step, groups, and counts on the device."""

    def __attrs_post_init__(self) -> None:
        for name in self.groups:
            if not re.fullmatch(r"[a-z0-9_][a-z0-9_.-]*", name) or name == naming.REST:
                raise ValueError(f"groups: {name!r} is no lower-case name, or is taken")
        if self.groups and METRICS * (len(self.groups) + 1) > self.max_keys:
            needed = METRICS * (len(self.groups) + 1)
            raise ValueError(f"max_keys: these groups and the rest make {needed} metrics")
        # Not settings, not state: what lives as long as the process.
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
        """Copy the weights, if the step is to be measured."""
        if not (run.progress.step + 1) % self._every:
            from fundamentallm_grad_stats.norms import Weights

            self._weights = Weights(self._groups)

    @hookimpl
    def settle_step(self, run: Run, applied: bool) -> None:
        """Measure the step, if it changed the weights."""
        if self._weights is None:
            return
        weights, self._weights = self._weights, None
        norms = weights.norms() if applied else {}
        for name, value in norms.items():
            run.log(name, value)
        if norms and self.histograms and run.rank == 0:
            # A new list: a snapshot may still hold the old one.
            self.pending = [*self.pending, [run.progress.step, *weights.histograms()]]

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Forget the histograms of steps that are void."""
        self._forget_later(run)

    @hookimpl
    def on_log(self, run: Run) -> None:
        """Write the histograms, and emit their sums since the last row as ``on_histogram``."""
        for group, counts in self._write(run).items():
            self._emit(run, f"{run.name_of(self)}/{group}", tuple(counts))

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        """Write what a signal has kept from being logged."""
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
                    text = f"{pattern!r} matches no parameter that is left over; {known}"
                    raise SettingsError(f"grad_stats.groups.{group}: {text}")
            return found
        found = naming.grouped(names, self.per)
        most = self.max_keys // METRICS
        if len(found) > most:
            log.warning(
                "grad_stats: %d groups would make more than %d metrics: neighbours are "
                "put together",
                len(found),
                self.max_keys,
            )
        return naming.merged(found, most)

    def _write(self, run: Run) -> dict[str, list[int]]:
        """Write the histograms, and return by group what they make together."""
        if not self.pending or run.rank:
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

            # What is pending may have been written before the run was killed.
            last = min([step, *(kept[0] - 1 for kept in self.pending)])
            lines.drop_after(last, self._path(run))

    def _path(self, run: Run) -> Path:
        return run.folder / f"{run.name_of(self)}.jsonl"
