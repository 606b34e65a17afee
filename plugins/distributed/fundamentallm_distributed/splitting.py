"""Split the layers of a model over the processes of a group, as the model's plan says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def split(model: nn.Module, mesh: DeviceMesh, plan: Any) -> dict[str, Tensor]:
    """Split a whole model, which every process has, in place; return the orders of its rows."""
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, order in plan.row_order.items():
            parameter = model.get_parameter(name)
            parameter.copy_(parameter[order])
    # All processes have drawn the same weights, so nothing has to be sent.
    parallelize_module(model, mesh, plan.styles, src_data_rank=None)
    _replicate_others(model, mesh)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
    return dict(plan.row_order)


def _replicate_others(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make the parameters that are not split distributed tensors, too.

    Fused optimizers and norms of gradients accept no mixture.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                continue
            if id(parameter) not in made:
                same = distribute_tensor(parameter.data, mesh, [Replicate()], src_data_rank=None)
                made[id(parameter)] = nn.Parameter(same)
            module.register_parameter(name, made[id(parameter)])


def ordered(tree: Any, orders: dict[str, Tensor], order: Tensor | None = None) -> Any:
    """Return a tree of dicts and lists with the rows of its tensors in other orders.

    An order is that of all tensors below the name of its parameter which have as many rows.
    """
    if isinstance(tree, dict):
        return {key: ordered(value, orders, orders.get(key, order)) for key, value in tree.items()}
    if isinstance(tree, list):
        return [ordered(value, orders, order) for value in tree]
    if order is None or not isinstance(tree, Tensor) or tree.shape[:1] != order.shape:
        return tree
    return tree[order.to(tree.device)]
