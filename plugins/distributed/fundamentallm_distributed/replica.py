"""A replica of the model in every process: gradients are added, buffers are copied."""

# No postponed annotations: DistributedDataParallel compares those of ``add_gradients`` with types.
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Replica(nn.Module):
    """A model whose forward pass can be replaced by one over the parameters alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.touches_parameters = False

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the model returns, or 0 with a graph to every parameter."""
        if not self.touches_parameters:
            return self.model(*inputs, **named)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return sum((parameter.sum() * 0.0 for parameter in trained), start=torch.zeros(()))


def replicate(model: nn.Module, *, bucket_mb: float, find_unused: bool) -> DistributedDataParallel:
    """Return the model such that a backward pass adds the gradients over all processes."""
    # Newer versions of torch have renamed the option.
    options = inspect.signature(DistributedDataParallel).parameters
    known = ("forward_sync_buffers", "broadcast_buffers")
    no_buffers: Any = {next(name for name in known if name in options): False}
    replica = Replica(model)
    ddp = DistributedDataParallel(
        replica,
        bucket_cap_mb=bucket_mb,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused,
        **no_buffers,
    )
    ddp.register_comm_hook(None, add_gradients)
    if not find_unused:
        _settle_buckets(ddp, replica)
    return ddp


def _settle_buckets(ddp: DistributedDataParallel, replica: Replica) -> None:
    """Let the first real step use the same buckets as all later ones.

    DistributedDataParallel has all gradients in one bucket until its first backward pass is over.
    Of more than two processes, the order of additions within a bucket depends on the position, so
    a resumed run would have other bits in its first step than the run that was not interrupted.
    """
    replica.touches_parameters = True
    ddp().backward()
    replica.touches_parameters = False
    for parameter in ddp.parameters():
        parameter.grad = None


def add_gradients(
    _: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """Add a bucket of gradients over all processes.

    DistributedDataParallel would average them. The losses are divided by the weight of the window
    over all processes already, and a sum has the bits of one process that accumulates.
    """
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


def copy_buffers_of_first(model: nn.Module) -> None:
    """Replace the buffers that a checkpoint holds with those of the first process."""
    saved = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in saved:
            dist.broadcast(buffer, src=0)
