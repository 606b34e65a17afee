"""How fast a run is, how much of the device it uses, and where its time goes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, ClassVar

from fundamentallm import SettingsError, field, ge, gt, hookimpl, optional, plugin

if TYPE_CHECKING:
    from collections.abc import Generator

    from fundamentallm import Run
    from fundamentallm_throughput.clock import Clock
    from fundamentallm_throughput.watch import Watch

__all__ = ["Throughput"]

log = logging.getLogger("fundamentallm")


@plugin
class Throughput:
    """Log tokens per second, step times, model FLOPs utilization and memory with every row, and
    tell at the end where the time went: which phase of the run, and which plugin in it.

    Nothing of it makes the host wait for the device in a step. One step in ``sample_every`` is
    timed inside, hook by hook; the others are left alone.
    """

    role = "observer"

    produces: ClassVar[tuple[str, ...]] = ("perf/*", "system/*")
    before: ClassVar[tuple[str, ...]] = ("console",)
    """At the end of the run: what is told after it has closed its log is in no log."""

    sample_every: int = field(default=20, validator=ge(1))
    """One step in this many is timed inside, hook by hook; 1 times all of them."""
    flops_per_token: float | None = field(default=None, validator=optional(gt(0)))
    """Floating-point operations of training on one token; by default what the model says, else
    six per parameter."""
    peak_flops: float | None = field(default=None, validator=optional(gt(0)))
    """What one device can do, in operations per second; by default that of a known GPU."""
    table: bool = True
    """Whether to tell at the end where the time went; the file says it in any case."""

    def __attrs_post_init__(self) -> None:
        # Not settings, not state: what lives as long as the process.
        self._watch: Watch | None = None
        self._peak: float | None = None
        self._validating = self._off = False

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Put a clock around what is heard from now on."""
        from fundamentallm_throughput.watch import Watch

        names = [name for name, one in run.plugins.items() if isinstance(one, Throughput)]
        if len(names) > 1:
            raise SettingsError(f"{' and '.join(names)} are both throughput: list it once")
        self._watch = Watch(run, names[0], self.sample_every, self.clock(run))

    def clock(self, run: Run) -> Clock:
        """Return the clock to time with: the host's, and on a GPU that of the GPU for the parts of
        steps. For whoever has another one."""
        from fundamentallm_throughput.clock import Clock
        from fundamentallm_throughput.device import marks

        return Clock(marks=marks(run.device))

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Find out what the device can do, and start the watch."""
        from fundamentallm_throughput.device import peak_flops

        self._peak = self.peak_flops or peak_flops(run.device)
        if self._watch is not None:
            self._watch.start(run)

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        """Note how long the step took; time the inside of the next, if it is its turn."""
        if self._watch is not None:
            self._watch.step_ended(run)

    @hookimpl(wrapper=True)
    def validate(self) -> Generator[None, dict[str, float], dict[str, float]]:
        """Note that what is reduced next are no metrics of a row."""
        self._validating = True
        return (yield)

    @hookimpl(wrapper=True)
    def reduce_metrics(self, run: Run) -> Generator[None, dict[str, float], dict[str, float]]:
        """Add the speed to a row of metrics: here the device has caught up with the host."""
        metrics = yield
        if self._validating or self._off:
            self._validating = False
            return metrics
        try:
            return metrics | self._measured(run)
        except Exception as error:  # as for any observer; but nobody guards a wrapper
            self._off = True
            log.warning("throughput logs nothing from now on: %r", error, exc_info=error)
            return metrics

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        """Tell where the time went, and write ``throughput.json`` into the run folder."""
        from fundamentallm_throughput import report

        watch, self._watch = self._watch, None
        if watch is None:  # the run failed before it was heard here
            return
        watch.stop(run)
        if run.rank == 0 and watch.started:
            facts = report.facts(run, watch)
            if self.table:
                log.info("%s", report.table(facts))
            report.write(run.folder / report.FILE, facts)

    def _measured(self, run: Run) -> dict[str, float]:
        from fundamentallm_throughput.device import flops_per_token, memory

        found = self._watch.period(run) if self._watch is not None else {}
        if found and self._peak is not None:
            tokens, samples = (found[f"perf/{unit}_per_second"] for unit in ("tokens", "samples"))
            length = round(tokens / samples)  # of this period: it may follow a schedule
            flops = self.flops_per_token or flops_per_token(run.model, length)
            found["perf/mfu"] = flops * tokens / (self._peak * run.world_size)
        return found | memory(run) if found else {}
