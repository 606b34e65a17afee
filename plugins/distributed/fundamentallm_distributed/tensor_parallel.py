"""Compute each layer of the model in several processes together."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from fundamentallm import SettingsError, field, ge, hookimpl, plugin
from fundamentallm_distributed.fsdp import Fsdp

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fundamentallm import Run


@plugin
class TensorParallel:
    """Split each layer of the model over groups of processes, which compute it together; with
    ``fsdp``, whose parts are then parts of these.

    The processes of a group read the same samples and draw the same random numbers. The model says
    how it is split, with a method ``tensor_parallel_plan``: Shoeybi et al., "Megatron-LM: Training
    Multi-Billion Parameter Language Models Using Model Parallelism" (2019, arXiv:1909.08053).
    """

    role = "training"
    # In groups of another size the weights are the same.
    free = ("*",)

    size: int = field(validator=ge(1))
    """The number of processes in a group: it must divide the number of all processes. The groups
    communicate several times in each layer, so a group belongs on one machine."""

    # By parameter name: where the rows of the split tensor are in the whole one.
    _orders: Any = field(init=False, factory=dict, repr=False)

    @hookimpl(wrapper=True)
    def join_processes(
        self, run: Run
    ) -> Generator[None, AbstractContextManager[None], AbstractContextManager[None]]:
        """Let the processes of a group read the same part of the data."""
        self._orders = {}
        self._fsdp_of(run)
        context = yield
        return self._joined(run, context)

    @contextlib.contextmanager
    def _joined(self, run: Run, inner: AbstractContextManager[None]) -> Iterator[None]:
        with inner:
            if run.world_size % self.size:
                raise SettingsError(
                    f"{run.name_of(self)}.size: {run.world_size} processes cannot form groups of "
                    f"{self.size}: start a multiple of {self.size}, or choose another size"
                )
            if self.size == 1:
                yield
                return
            # The processes of a group are neighbours: on one machine, if it starts enough of them.
            run.data_rank, run.data_size = run.rank // self.size, run.world_size // self.size
            from torch.distributed.tensor.parallel import loss_parallel

            # For the whole run: the forward and backward passes of training, and evaluations.
            with loss_parallel():
                yield

    @hookimpl(wrapper=True)
    def distribute_model(self, run: Run, model: nn.Module) -> Generator[None, nn.Module, nn.Module]:
        """Split the layers over the processes of a group, before ``fsdp`` divides the parts."""
        # Also not in a run that a command has loaded, of one process.
        if self.size > 1 and run.world_size > 1:
            from fundamentallm_distributed.sharding import grid
            from fundamentallm_distributed.splitting import split

            fsdp = self._fsdp_of(run)
            # A row is a group.
            mesh = grid(run, run.data_size, ("data", "tensor"), fsdp.timeout)
            self._orders = split(run.model, mesh["tensor"], self._plan(run))
            fsdp.mesh = mesh["data"]
        return (yield)

    def _plan(self, run: Run) -> Any:
        make = getattr(run.model, "tensor_parallel_plan", None)
        if make is None:
            raise SettingsError(
                f"{run.name_of(self)}: {type(run.model).__name__} has no method "
                "tensor_parallel_plan(size), so it cannot be split over processes: use a model "
                "that has it, such as 'gpt', or remove the plugin"
            )
        return make(self.size)

    def _fsdp_of(self, run: Run) -> Fsdp:
        name = run.name_of(self)
        found = next((one for one in run.plugins.values() if isinstance(one, Fsdp)), None)
        if found is None:
            raise SettingsError(
                f"{name}: needs 'fsdp' in `plugins`, which joins the processes and divides what "
                "this one leaves whole; 'ddp' does not work with it"
            )
        if self.size > 1 and found.replicas > 1:
            raise SettingsError(
                f"{run.name_of(found)}.replicas: {found.replicas} replicas do not work with "
                f"{name}: leave it out"
            )
        return found

    @hookimpl(wrapper=True)
    def gather(self, run: Run, tree: Any) -> Generator[None, Any, Any]:
        """Put the rows of whole tensors into the order of one process."""
        whole = yield
        if not self._orders:
            return whole
        from fundamentallm_distributed.splitting import ordered

        return ordered(whole, {name: order.argsort() for name, order in self._orders.items()})

    @hookimpl(wrapper=True)
    def spread(self, run: Run, tensor: Tensor, like: Tensor) -> Generator[None, Tensor, Tensor]:
        """Take the rows of the heads that this process computes."""
        part = yield
        names = (name for name in self._orders if run.model.get_parameter(name) is like)
        name = next(names, None)
        if name is None or tensor.shape[:1] != like.shape[:1]:
            return part
        from fundamentallm_distributed.sharding import part_like

        return part_like(tensor[self._orders[name]], like)
