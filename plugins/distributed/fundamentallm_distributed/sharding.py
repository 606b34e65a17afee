"""Divide a model and whole tensors among the processes, with torch's ``fully_shard``."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Replicate, distribute_tensor

from fundamentallm import find_blocks

if TYPE_CHECKING:
    from fundamentallm import Run
    from fundamentallm_distributed.fsdp import Fsdp


def shard(run: Run, model: nn.Module, settings: Fsdp) -> list[Any]:
    """Divide the weights of the model in place; return the sharded modules, the model last."""
    options: dict[str, Any] = {
        "mesh": settings.mesh or mesh(run, settings),
        "mp_policy": precision(settings),
        "offload_policy": offload(run.device, wanted=settings.offload),
    }
    modules: list[Any] = [*blocks(run, settings), model]
    for module in modules:
        # The weights outside of the blocks are needed last in the forward pass, and at once in the
        # backward pass.
        frees = settings.reshard and module is not model
        fully_shard(module, reshard_after_forward=frees, **options)
    for module in modules:
        # The losses are divided by the weight of the window over all processes already. Gloo has no
        # operation that divides or multiplies.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for name in settings.methods:
        if callable(getattr(model, name, None)):
            register_fsdp_forward_method(model, name)
    return modules


def blocks(run: Run, settings: Fsdp) -> list[nn.Module]:
    """Return the modules that are sharded as units; none of a model without a list of modules."""
    has_list = any(isinstance(one, nn.ModuleList) and len(one) for one in run.model.modules())
    if settings.blocks is None and not has_list:
        return []
    name = f"{run.name_of(settings)}.blocks"
    return list(find_blocks(run.model, settings.blocks, name).values())


def mesh(run: Run, settings: Fsdp) -> DeviceMesh:
    """Return the processes in one row, or as a row for each replica of the model."""
    if settings.replicas == 1:
        return init_device_mesh(run.device, (run.world_size,), mesh_dim_names=("shard",))
    return grid(run, settings.replicas, ("replicate", "shard"), settings.timeout)


def grid(run: Run, rows: int, names: tuple[str, str], timeout: float) -> DeviceMesh:
    """Return the processes in some rows, with the names of the two dimensions."""
    ranks = torch.arange(run.world_size).reshape(rows, -1)
    groups = []
    # Made here, since those that the mesh makes would have another timeout.
    for members in (ranks.T, ranks):
        group, _ = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
            members.tolist(), timeout=timedelta(seconds=timeout)
        )
        groups.append(group)
    return DeviceMesh.from_group(groups, run.device, mesh=ranks, mesh_dim_names=names)


def precision(settings: Fsdp) -> MixedPrecisionPolicy:
    """Return the types of the weights and of the sums of gradients; None leaves them."""
    types = {"bf16": torch.bfloat16, "fp32": torch.float32}
    low = settings.params == "bf16"
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low else None,
        reduce_dtype=types[settings.reduce] if low or settings.reduce == "bf16" else None,
    )


def offload(device: str, *, wanted: bool) -> OffloadPolicy:
    """Return where weights are while no block uses them. On the CPU there is no other place."""
    return CPUOffloadPolicy() if wanted and device != "cpu" else OffloadPolicy()


def part_like(tensor: Tensor, like: Any) -> Tensor:
    """Return this process's part of a whole tensor, which all processes have.

    It is divided as ``like`` is where the shapes fit. Where they do not, it stays whole.
    """
    fits = [
        not place.is_replicate()
        and place.dim < tensor.ndim
        and tensor.shape[place.dim] == like.shape[place.dim]
        for place in like.placements
    ]
    places = [p if fit else Replicate() for p, fit in zip(like.placements, fits, strict=True)]
    whole = tensor.to(like.device)
    part: Tensor = distribute_tensor(whole, like.device_mesh, places, src_data_rank=None)
    return part


def whole_of(tensor: Any) -> Tensor:
    """Return the whole tensor in all processes, which all call this."""
    places = list(tensor.placements)
    # What was divided last is collected first.
    for dimension in range(len(places)):
        places[dimension] = Replicate()
        tensor = tensor.redistribute(placements=places)
    whole: Tensor = tensor.to_local()
    return whole
