"""Use torch's deterministic algorithms for the whole run."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fundamentallm import SettingsError, field, hookimpl, plugin

if TYPE_CHECKING:
    from fundamentallm import Run

__all__ = ["Deterministic"]

log = logging.getLogger("fundamentallm")

PROMISE = (
    "%s: on; the same settings, data, versions, hardware, %d CPU threads and number of processes "
    "give the same bits; not covered: a change of any of these, and kernels from outside torch "
    "that use atomic additions%s"
)
ADVICE = (
    "%s: torch has no deterministic algorithm for an operation of this run: use another operation, "
    "or allow it with %s.warn_only = true"
)
# Occurs in torch's error for an operation without a deterministic algorithm.
REFUSAL = "use_deterministic_algorithms"


@plugin
class Deterministic:
    """Use only torch's deterministic algorithms, so that equal runs end with equal bits.

    An operation without one is an error. Random numbers and the order of the data follow from
    ``[run] seed`` with or without this plugin.
    """

    role = "control"

    warn_only: bool = False
    """Warn about an operation without a deterministic algorithm instead of ending the run."""
    fill_uninitialized_memory: bool = True
    """Fill new tensors with NaN, so that reading memory before writing it always gives the same
    result. Costs time; a program that never does this is deterministic without it."""

    _before: Any = field(init=False, default=None, repr=False)

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Turn deterministic algorithms on, and log what they do not cover."""
        import torch

        from fundamentallm_deterministic.switches import read_switches, set_switches, turned_on

        names = [name for name, one in run.plugins.items() if isinstance(one, Deterministic)]
        if len(names) > 1:
            raise SettingsError(
                f"{' and '.join(names)} are all instances of deterministic, which is one switch "
                "for the whole process: list one of them"
            )
        self._before = read_switches()
        set_switches(turned_on(self._before, self.warn_only, self.fill_uninitialized_memory))
        if run.rank == 0:
            rest = ", operations that only warn" if self.warn_only else ""
            log.info(PROMISE, names[0], torch.get_num_threads(), rest)

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        """Restore the previous switches, also after an error, and advise if torch refused."""
        if self._before is None:  # the run ended before on_run_start of this plugin
            return
        from fundamentallm_deterministic.switches import set_switches

        set_switches(self._before)
        self._before = None
        if REFUSAL in str(run.error):
            name = run.name_of(self)
            log.error(ADVICE, name, name)
