"""Stochastic gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fundamentallm import field, ge, gt, hookimpl, le, lt, plugin

# Not under TYPE_CHECKING: the types of the fields are read when settings are checked.
from fundamentallm_optimizers.groups import Group

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fundamentallm import Run


@plugin
class SGD:
    """Stochastic gradient descent, with momentum (also Nesterov's) if wanted.

    Sutskever et al., "On the importance of initialization and momentum in deep learning" (2013).
    """

    lr: float = field(validator=gt(0))
    """The learning rate, before any schedule."""
    momentum: float = field(default=0.0, validator=[ge(0), lt(1)])
    """How much of the previous update is kept in the next."""
    dampening: float = field(default=0.0, validator=[ge(0), le(1)])
    """How much of the gradient is kept out of the momentum."""
    nesterov: bool = False
    """Look ahead along the momentum; needs `momentum`, and no `dampening`."""
    weight_decay: float = field(default=0.0, validator=ge(0))
    """This times the weight is added to the gradient of the decayed weights."""
    decay: Literal["matrices", "all"] = "matrices"
    """What is decayed: tensors of two and more dimensions, or everything."""
    fused: bool | None = None
    """One kernel for the whole update; by default without momentum, wherever the parameters' device
    has one. With momentum, PyTorch's fused kernel fails if some parameters of a group get their
    first gradient later than others."""
    groups: list[Group] = field(factory=list)
    """Parameters with a learning rate or weight decay of their own."""

    def __attrs_post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: needs a momentum above 0")
        if self.nesterov and self.dampening:
            raise ValueError("dampening: must be 0 with nesterov")

    @hookimpl
    def build_optimizer(self, run: Run) -> Optimizer:
        """Make PyTorch's optimizer for the groups of the model's parameters, frozen ones too."""
        from torch import optim

        from fundamentallm_optimizers.parameters import divide, use_fused

        return optim.SGD(
            divide(run, self),
            momentum=self.momentum,
            dampening=self.dampening,
            nesterov=self.nesterov,
            fused=use_fused(run, self, by_default=not self.momentum),
        )
