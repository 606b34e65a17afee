"""Deterministic algorithms for the whole run, or an error where torch has none."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fundamentallm import SettingsError, field, hookimpl, plugin

if TYPE_CHECKING:
    from fundamentallm import Run

__all__ = ["Deterministic"]

log = logging.getLogger("fundamentallm")

PROMISE = (
    "%s: on, for the same bits again from the same settings, data, versions, hardware, %d CPU "
    "threads and number of processes; not covered: any other of these, kernels from outside torch "
    "that add in whatever order their threads come (atomics)%s"
)
ADVICE = (
    "%s: torch has no deterministic algorithm for an operation of this run: use another one, or "
    "let it pass with %s.warn_only = true"
)
# What torch says of an operation that it has no deterministic algorithm for.
REFUSAL = "use_deterministic_algorithms"


@plugin
class Deterministic:
    """Let torch compute with deterministic algorithms alone: the same run twice, the same bits.

    Algorithms only: random numbers, the order of the data and the rest follow from ``[run] seed``
    with or without this plugin.
    """

    warn_only: bool = False
    """Warn of an operation that has no deterministic algorithm, in place of ending the run."""
    fill_uninitialized_memory: bool = True
    """Fill new tensors with NaN before they are written, so that reading too early shows. Costs
    time; a program that never does so is as deterministic without."""

    _before: Any = field(init=False, default=None, repr=False)

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Turn it on before anything is built, and say what it does not cover."""
        import torch

        from fundamentallm_deterministic.switches import now, set_switches, turned_on

        names = [name for name, one in run.plugins.items() if isinstance(one, Deterministic)]
        if len(names) > 1:
            raise SettingsError(
                f"{' and '.join(names)} are both instances of deterministic, which is one switch "
                "for the whole process: list one"
            )
        self._before = now()
        set_switches(turned_on(self._before, self.warn_only, self.fill_uninitialized_memory))
        if run.rank == 0:
            rest = ", operations that only warn" if self.warn_only else ""
            log.info(PROMISE, names[0], torch.get_num_threads(), rest)

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        """Put everything back to where it was, also after an error."""
        if self._before is None:  # the run ended before it began
            return
        from fundamentallm_deterministic.switches import set_switches

        set_switches(self._before)
        self._before = None
        if REFUSAL in str(run.error):
            name = next(name for name, listed in run.plugins.items() if listed is self)
            log.error(ADVICE, name, name)
