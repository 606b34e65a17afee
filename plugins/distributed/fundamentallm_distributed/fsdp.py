"""Train in several processes that each hold a part of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from fundamentallm import SettingsError, field, ge, gt, hookimpl, plugin
from fundamentallm_distributed.processes import Processes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fundamentallm import Run


@plugin
class Fsdp(Processes):
    """Train in several processes that each hold a part of every weight, gradient and optimizer
    state, and add their gradients.

    A process collects the whole weights of a block only while it computes with them: Zhao et al.,
    "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (2023, arXiv:2304.11277).
    """

    role = "training"
    # The empty name lets a run add and remove the plugin. In another number of processes, in other
    # blocks or on another device the weights are the same.
    free = ("", "timeout", "reshard", "blocks", "replicas", "methods", "offload")

    timeout: float = field(default=600.0, validator=gt(0))
    """Seconds after which a process that does not answer counts as lost."""
    reshard: bool = True
    """Whether to free the whole weights of a block after its forward pass, and to collect them
    again for its backward pass. This saves memory and costs half as much communication again."""
    blocks: list[str] | None = None
    """Glob patterns on module names that select the blocks (`*` also matches dots), such as
    `["encoder.layers.*"]`; of nested matches only the outer modules count. By default the elements
    of the `nn.ModuleList` with the most parameters. What is in no block is collected as a whole."""
    replicas: int = field(default=1, validator=ge(1))
    """The number of groups of processes that each hold the whole model (hybrid sharding): with the
    number of machines, weights travel only inside of a machine. It must divide the number of
    processes."""
    params: Literal["fp32", "bf16"] = "fp32"
    """The type in which weights travel and compute. `bf16` halves the communication; the optimizer
    still updates the original weights. `fp32` leaves the type as the model has it."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """The type in which gradients are added. `fp32` leaves the type of the weights if `params` is
    `fp32`, too."""
    offload: bool = False
    """Whether weights, gradients and optimizer states stay in the memory of the host while no block
    uses them. The optimizer then runs on the host."""
    methods: list[str] = field(factory=lambda: ["logits", "make_cache"])
    """Methods of the model, in addition to `forward`, that use its weights: `sample` calls `logits`
    and `make_cache`. Those that the model does not have are ignored."""

    mesh: Any = field(init=False, default=None, repr=False)
    """The processes to divide the weights among, if a plugin has split them over others already."""
    _modules: Any = field(init=False, factory=list, repr=False)

    def __attrs_post_init__(self) -> None:
        if self.blocks == []:
            raise ValueError("blocks: is empty; leave it out for the largest list of modules")

    @hookimpl
    def distribute_model(self, run: Run, model: nn.Module) -> nn.Module:
        """Divide every weight of the model among the processes, if there are several."""
        self._modules = []
        self._check(run)
        if run.world_size > 1:
            from fundamentallm_distributed.sharding import shard

            self._modules = shard(run, model, self)
        return model

    def _check(self, run: Run) -> None:
        name = run.name_of(self)
        # Else a run of one process would compute something else, and nothing would show it.
        for setting in ("params", "reduce"):
            if run.world_size == 1 and getattr(self, setting) != "fp32":
                raise SettingsError(
                    f"{name}.{setting}: one process divides nothing, and computes in the type of "
                    f"the weights: list 'amp' for bf16, or start several processes"
                )
        if run.world_size > 1 and run.world_size % self.replicas:
            raise SettingsError(
                f"{name}.replicas: {run.world_size} processes cannot form {self.replicas} groups "
                f"of one size"
            )

    @hookimpl(wrapper=True)
    def train_microbatch(self, is_last: bool) -> Generator[None, None, None]:
        """Add the gradients of all processes in the last micro-batch of a window only."""
        if self._modules:
            root = self._modules[-1]
            root.set_requires_gradient_sync(is_last)
        return (yield)

    @hookimpl(wrapper=True)
    def evaluation_weights(
        self, run: Run
    ) -> Generator[None, AbstractContextManager[None], AbstractContextManager[None]]:
        """Give all processes the buffers of the first one before a validation, and free the whole
        weights after it."""
        context = yield
        return self._evaluating(run, context) if self._modules else context

    @contextlib.contextmanager
    def _evaluating(self, run: Run, inner: AbstractContextManager[None]) -> Iterator[None]:
        from fundamentallm_distributed.replica import copy_buffers_of_first

        copy_buffers_of_first(run.model)
        with inner:
            try:
                yield
            finally:
                # Without a backward pass, some are still there: those of other weights, if the
                # context exchanged them.
                for module in self._modules:
                    module.reshard()

    @hookimpl
    def gather(self, run: Run, tree: Any) -> Any:
        """Collect the whole tensors in the first process, in the memory of its host."""
        if isinstance(tree, dict):
            return {key: self.gather(run, value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [self.gather(run, value) for value in tree]
        if not hasattr(tree, "full_tensor"):
            return tree
        from fundamentallm_distributed.sharding import whole_of

        # One after the other, so that a device never holds a second whole one.
        whole = whole_of(tree)
        return whole.cpu() if run.rank == 0 else whole.new_empty(0, device="cpu")

    @hookimpl
    def spread(self, run: Run, tensor: Tensor, like: Tensor) -> Tensor:
        """Keep this process's part of a whole tensor."""
        if not hasattr(like, "full_tensor") or not tensor.ndim:
            return tensor
        from fundamentallm_distributed.sharding import part_like

        return part_like(tensor, like)
