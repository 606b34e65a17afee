"""Measure the speed of a run, its use of the device, and the time of its phases and plugins."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, ClassVar

from fundamentallm import SettingsError, field, ge, gt, hookimpl, optional, plugin

if TYPE_CHECKING:
    from collections.abc import Generator

    from fundamentallm import Run
    from fundamentallm_throughput.clock import Clock
    from fundamentallm_throughput.slow_process import SlowProcess
    from fundamentallm_throughput.step_timer import StepTimer

__all__ = ["Throughput"]

log = logging.getLogger("fundamentallm")


@plugin
class Throughput:
    """Log tokens per second, step times, model FLOPs utilization and memory; print a table of the
    time of each phase and plugin at the end.

    It reads no device value in a step. One step in ``sample_every`` is timed hook by hook; the
    others are not changed.
    """

    role = "observer"

    produces: ClassVar[tuple[str, ...]] = ("perf/*", "system/*")
    before: ClassVar[tuple[str, ...]] = ("console",)
    """The table must be printed before the console closes its log."""

    sample_every: int = field(default=20, validator=ge(1))
    """One step in this many is timed hook by hook; 1 means all of them."""
    flops_per_token: float | None = field(default=None, validator=optional(gt(0)))
    """Floating-point operations of training on one token; by default those that the model states,
    else six per parameter."""
    peak_flops: float | None = field(default=None, validator=optional(gt(0)))
    """Peak operations per second of one device; by default those of a known GPU."""
    slow_factor: float = field(default=1.5, validator=gt(1))
    """Warn of a process that takes this many times as long as the median process for data and
    forward passes, in three rows in a row, and costs a tenth of the step time."""
    table: bool = True
    """Print the table of times at the end; the file has it in any case."""

    def __attrs_post_init__(self) -> None:
        # Not settings, not state: what lives as long as the process.
        self._timer: StepTimer | None = None
        self._slow: SlowProcess | None = None
        self._peak: float | None = None
        self._off = False

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Time all hooks that are called from now on."""
        from fundamentallm_throughput.slow_process import SlowProcess
        from fundamentallm_throughput.step_timer import StepTimer

        names = [name for name, one in run.plugins.items() if isinstance(one, Throughput)]
        if len(names) > 1:
            raise SettingsError(f"{' and '.join(names)} are both throughput: list it once")
        self._slow = SlowProcess(self.slow_factor)
        self._timer = StepTimer(run, names[0], self.sample_every, self.clock(run))

    def clock(self, run: Run) -> Clock:
        """Return the clock: that of the host, and on a GPU its events for the parts of steps. A
        subclass may return another one."""
        from fundamentallm_throughput.clock import Clock
        from fundamentallm_throughput.device import marks

        return Clock(marks=marks(run.device))

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Find the peak FLOP/s of the device, and start the timer."""
        from fundamentallm_throughput.device import peak_flops

        self._peak = self.peak_flops or peak_flops(run.device)
        if self._timer is not None:
            self._timer.start(run)

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        """Record the time of the step; choose whether the next is timed hook by hook."""
        if self._timer is not None:
            self._timer.step_ended(run)

    @hookimpl(wrapper=True)
    def reduce_metrics(
        self, run: Run, scope: str
    ) -> Generator[None, dict[str, float], dict[str, float]]:
        """Add the speed to a row of metrics, whose values have just been read from the device."""
        metrics = yield
        if scope != "row" or self._off:
            return metrics
        try:
            return self._compared(run, metrics | self._measured(run))
        except Exception as error:  # a wrapper of an observer is not muted for long
            self._off = True
            log.warning("throughput logs nothing from now on: %r", error, exc_info=error)
            return metrics

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        """Print the table of times, and write ``throughput.json`` into the run folder."""
        from fundamentallm_throughput import report

        timer, self._timer = self._timer, None
        if timer is None:  # the run failed before on_run_start
            return
        timer.stop(run)
        if run.rank == 0 and timer.started:
            facts = report.facts(run, timer)
            if self.table:
                log.info("%s", report.table(facts))
            report.write(run.folder / report.FILE, facts)

    def _measured(self, run: Run) -> dict[str, float]:
        from fundamentallm_throughput.device import flops_per_token, memory

        found = self._timer.period(run) if self._timer is not None else {}
        if found and self._peak is not None:
            tokens, samples = (found[f"perf/{unit}_per_second"] for unit in ("tokens", "samples"))
            length = round(tokens / samples)  # of this period: a schedule may change it
            flops = self.flops_per_token or flops_per_token(run.model, length)
            found["perf/mfu"] = flops * tokens / (self._peak * run.world_size)
        return found | memory(run) if found else {}

    def _compared(self, run: Run, metrics: dict[str, float]) -> dict[str, float]:
        if self._slow is None or self._timer is None or run.world_size == 1:
            return metrics
        found = self._slow.compared(run, metrics)
        self._slow.log_own(run, self._timer.samples)
        return found
