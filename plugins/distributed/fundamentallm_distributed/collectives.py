"""Collectives on tensors of the model."""

# No postponed annotations: DistributedDataParallel compares those of ``add_gradients`` with types.
import torch
from torch import Tensor, nn
from torch import distributed as dist


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
