"""Stochastic gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fundamentallm import SettingsError, field, ge, gt, hookimpl, le, lt, plugin

# Not under TYPE_CHECKING: the host reads the types of the fields when it checks settings.
from fundamentallm_optimizers.group import Group

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fundamentallm import Run


@plugin
class SGD:
    """Train with stochastic gradient descent, optionally with (Nesterov) momentum.

    Sutskever et al., "On the importance of initialization and momentum in deep learning" (2013).
    """

    role = "optimizer"

    lr: float = field(validator=gt(0))
    """The learning rate, before any schedule."""
    momentum: float = field(default=0.0, validator=[ge(0), lt(1)])
    """The momentum buffer is this times its last value, plus the gradient."""
    dampening: float = field(default=0.0, validator=[ge(0), le(1)])
    """The gradient enters the momentum buffer times 1 minus this."""
    nesterov: bool = False
    """Use Nesterov momentum; needs `momentum` above 0 and no `dampening`."""
    weight_decay: float = field(default=0.0, validator=ge(0))
    """This times the weight is added to the gradient of decayed weights (an L2 penalty)."""
    decay: Literal["matrices", "all"] = "matrices"
    """Which parameters are decayed: those of two and more dimensions, or all."""
    fused: bool | None = None
    """Use one kernel for the whole update. By default without momentum, if the device of the
    parameters has one, and if they are not divided among processes. With momentum, PyTorch's fused
    kernel fails if some parameters of a group get their first gradient later than others."""
    groups: list[Group] = field(factory=list)
    """Groups of parameters with their own learning rate or weight decay."""

    def __attrs_post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: needs a momentum above 0")
        if self.nesterov and self.dampening:
            raise ValueError("dampening: must be 0 with nesterov")

    @hookimpl
    def build_optimizer(self, run: Run) -> Optimizer:
        """Build PyTorch's optimizer for all parameters of the model, including frozen ones."""
        from torch import optim

        from fundamentallm_optimizers.param_groups import is_divided, param_groups, use_fused

        divided = is_divided(run.model)
        if divided and self.fused:
            raise SettingsError(
                f"{run.name_of(self)}.fused: PyTorch has no fused kernel of SGD for weights that "
                f"are divided among processes; leave fused out"
            )
        return optim.SGD(
            param_groups(run, self),
            momentum=self.momentum,
            dampening=self.dampening,
            nesterov=self.nesterov,
            fused=None if divided else use_fused(run, self, by_default=not self.momentum),
        )
