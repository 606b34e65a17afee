"""The processes of a run: how they meet, exchange values, and notice that one is lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from fundamentallm import SettingsError, hookimpl
from fundamentallm_distributed.start import Start

if TYPE_CHECKING:
    from torch import Tensor

    from fundamentallm import Run

log = logging.getLogger("fundamentallm")


class Processes:
    """The hooks that every plugin needs which trains in several processes."""

    timeout: float

    # Any, since annotations of a plugin class are resolved when no torch may be imported.
    _control: Any = None

    @property
    def is_alone(self) -> bool:
        """Whether no launcher started this process as one of a group, not even of one."""
        return self._control is None

    @hookimpl
    def join_processes(self, run: Run) -> AbstractContextManager[None]:
        """Meet the other processes that torchrun, srun or ``fundamentallm launch`` started."""
        return self._joined(run)

    @contextlib.contextmanager
    def _joined(self, run: Run) -> Iterator[None]:
        start = Start.find()
        if start is None:
            yield
            return
        from fundamentallm_distributed.control import ControlGroup

        # The control group uses gloo also where the tensors use NCCL: the host then never waits for
        # a device, and it notices at once that another process is gone.
        with start.joined(run.device, self.timeout):
            control = ControlGroup(self.timeout)
            run.rank = run.data_rank = control.rank
            run.world_size = run.data_size = control.size
            self._control = control
            try:
                with _logging_as(run.rank):
                    self._compare_settings(run)
                    yield
            finally:
                self._control = None
                self.release(run)

    def release(self, run: Run) -> None:
        """Free what uses the process group, which is destroyed next."""

    def _compare_settings(self, run: Run) -> None:
        """Check that all processes were started with the same settings and versions."""
        import torch

        text = json.dumps(run.tables, sort_keys=True, default=str)
        mine = [hashlib.sha256(text.encode()).hexdigest()[:12], str(torch.__version__)]
        everyones = self.agree(run, "settings", mine)
        for rank, other in enumerate(everyones):
            if other != everyones[0]:
                what = "settings" if other[0] != everyones[0][0] else "a torch"
                raise SettingsError(
                    f"process {rank} was started with {what} other than those of process 0 "
                    f"({', '.join(other)} instead of {', '.join(everyones[0])})"
                )

    @hookimpl
    def agree(self, run: Run, topic: str, mine: Any) -> list[Any]:
        """Exchange small JSON values with all processes over gloo."""
        if self._control is None:
            return [mine]
        moment = f"{'in step' if run.in_step else 'after step'} {run.progress.step + run.in_step}"
        found: list[Any] = self._control.exchange(f"{topic}, {moment}", mine)
        return found

    @hookimpl(wrapper=True)
    def forward(self, run: Run) -> Generator[None, Tensor, Tensor]:
        """Make the loss of a micro-batch without a target 0: the mean over nothing is NaN."""
        # The micro-batch is there because other processes wait in its passes.
        loss = yield
        return loss if run.weight else loss.nan_to_num(0.0)


@contextlib.contextmanager
def _logging_as(rank: int) -> Iterator[None]:
    """Let other processes than the first log warnings only, with their rank."""
    if not rank:
        yield
        return

    def name_rank(record: logging.LogRecord) -> bool:
        record.msg, record.args = f"[process {rank}] {record.getMessage()}", ()
        return True

    level = log.level
    log.addFilter(name_rank)
    log.setLevel(max(logging.WARNING, level))
    try:
        yield
    finally:
        log.setLevel(level)
        log.removeFilter(name_rank)
