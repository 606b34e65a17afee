"""Adafactor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fundamentallm import field, ge, gt, hookimpl, le, optional, plugin

# Not under TYPE_CHECKING: the types of the fields are read when settings are checked.
from fundamentallm_optimizers.groups import Group

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fundamentallm import Run


@plugin
class Adafactor:
    """Adafactor: the running mean of squares of a matrix is kept as one row and one column.

    Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (2018), with
    the defaults of PyTorch, whose documentation tells what differs from the paper.
    """

    lr: float = field(default=1e-2, validator=gt(0))
    """The largest relative size of an update, before any schedule: of the root mean square of a
    tensor's weights. Update t has min(lr, 1/sqrt(t)) of it."""
    beta2_decay: float = field(default=-0.8, validator=le(0))
    """The decay rate of the running mean of the squared gradient is 1 - t ** this at update t."""
    eps1: float | None = field(default=None, validator=optional(ge(0)))
    """The least denominator of the update; by default the smallest step of the weights' type."""
    eps2: float = field(default=1e-3, validator=ge(0))
    """The least root mean square that weights count with, so that zeros can grow."""
    clip_threshold: float = field(default=1.0, validator=ge(1))
    """An update with a root mean square above this is scaled down to it (`d` in PyTorch)."""
    weight_decay: float = field(default=0.0, validator=ge(0))
    """Each update shrinks the decayed weights by learning rate times this."""
    decay: Literal["matrices", "all"] = "matrices"
    """What is decayed: tensors of two and more dimensions, or everything."""
    foreach: bool = False
    """Update all tensors together: faster on a GPU, for as much memory again as the weights take
    while it lasts."""
    groups: list[Group] = field(factory=list)
    """Parameters with a learning rate or weight decay of their own."""

    @hookimpl
    def build_optimizer(self, run: Run) -> Optimizer:
        """Make PyTorch's optimizer for the groups of the model's parameters, frozen ones too."""
        from torch import optim

        from fundamentallm_optimizers.parameters import divide

        return optim.Adafactor(
            divide(run, self),
            beta2_decay=self.beta2_decay,
            eps=(self.eps1, self.eps2),
            d=self.clip_threshold,
            foreach=self.foreach,
        )
