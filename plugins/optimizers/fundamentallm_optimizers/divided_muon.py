"""Muon for matrices that are divided among processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import distribute_tensor
from torch.optim import Muon

if TYPE_CHECKING:
    from collections.abc import Callable


class DividedMuon(Muon):
    """PyTorch's Muon, one whole matrix after the other.

    PyTorch's own step orthogonalizes parts, or products of parts in bf16, and its result differs
    from that of one process as much as it moves the weights. Here every process computes each
    update with the whole matrix, its gradient and its momentum, and keeps its part.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every matrix that has a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Any, group: dict[str, Any]) -> None:
        whole = nn.Parameter(parameter.full_tensor())
        whole.grad = parameter.grad.full_tensor()
        muon = Muon([{**group, "params": [whole]}])
        for key, value in self.state[parameter].items():
            muon.state[whole][key] = value.full_tensor()
        muon.step()  # type: ignore[no-untyped-call]
        # Not the hook ``spread``: another plugin may have changed the order of the rows.
        mesh, places = parameter.device_mesh, parameter.placements
        parameter.copy_(distribute_tensor(whole.detach(), mesh, places, src_data_rank=None))
        for key, value in muon.state[whole].items():
            part = distribute_tensor(value, mesh, places, src_data_rank=None)
            self.state[parameter][key] = part
