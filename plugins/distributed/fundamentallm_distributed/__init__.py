"""Train one model in several processes: which are one run with one folder and one set of files."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from fundamentallm import field, gt, hookimpl, plugin
from fundamentallm_distributed.fsdp import Fsdp
from fundamentallm_distributed.processes import Processes
from fundamentallm_distributed.tensor_parallel import TensorParallel

if TYPE_CHECKING:
    from torch import nn

    from fundamentallm import Run

__all__ = ["Ddp", "Fsdp", "TensorParallel"]


@plugin
class Ddp(Processes):
    """Train in several processes that each hold the whole model, and add their gradients."""

    role = "training"
    # The same settings give the same run in any number of processes, with or without this plugin.
    free = ("*",)

    timeout: float = field(default=600.0, validator=gt(0))
    """Seconds after which a process that does not answer counts as lost."""
    bucket_mb: float = field(default=25.0, validator=gt(0))
    """Size of the buckets in which gradients are added, in MiB: each is sent as soon as it is
    complete, while the rest is still being computed."""
    find_unused: bool = False
    """Whether to look in every step for parameters without a gradient. Needed for a model that
    does not use all of its parameters in each forward pass; it costs a pass over the graph."""
    buffers: Literal["first", "own"] = "first"
    """Which buffers, such as the running means of a batch normalization, a validation uses: those
    of the first process, which are also the ones that are saved, or each process its own."""

    _ddp: Any = field(init=False, default=None, repr=False)

    @hookimpl
    def distribute_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Wrap the model in ``DistributedDataParallel``, if there are several processes."""
        self._ddp = None
        if self.is_alone:
            return model
        from fundamentallm_distributed.replica import replicate

        self._ddp = replicate(model, bucket_mb=self.bucket_mb, find_unused=self.find_unused)
        return self._ddp  # type: ignore[no-any-return]

    def release(self, run: Run) -> None:
        """Unwrap the model: a wrapper that outlives its process group may hang when it is freed."""
        if self._ddp is not None:
            self._ddp, run.module = None, run.model
            gc.collect()  # the wrapper refers to itself

    @hookimpl(wrapper=True)
    def train_microbatch(self, is_last: bool) -> Generator[None, None, None]:
        """Add the gradients of all processes in the last micro-batch of a window only."""
        if is_last or self._ddp is None:
            return (yield)
        with self._ddp.no_sync():
            return (yield)

    @hookimpl(wrapper=True)
    def evaluation_weights(
        self, run: Run
    ) -> Generator[None, AbstractContextManager[None], AbstractContextManager[None]]:
        """Give all processes the buffers of the first one before a validation."""
        context = yield
        if self._ddp is not None and self.buffers == "first":
            from fundamentallm_distributed.replica import copy_buffers_of_first

            copy_buffers_of_first(run.model)
        return context
