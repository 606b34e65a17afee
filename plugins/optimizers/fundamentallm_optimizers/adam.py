"""AdamW and Adam."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fundamentallm import field, ge, gt, hookimpl, lt, plugin

# Not under TYPE_CHECKING: the host reads the types of the fields when it checks settings.
from fundamentallm_optimizers.group import Group

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fundamentallm import Run


@plugin
class AdamW:
    """Train with AdamW: Adam with decoupled weight decay; the defaults are those of GPT-3.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019, arXiv:1711.05101).
    Defaults: Brown et al., "Language Models are Few-Shot Learners" (2020, arXiv:2005.14165),
    appendix B, and for `lr` the smallest model of its table 2.1.
    """

    role = "optimizer"

    lr: float = field(default=6e-4, validator=gt(0))
    """The learning rate, before any schedule."""
    beta1: float = field(default=0.9, validator=[ge(0), lt(1)])
    """Decay rate of the running mean of the gradient."""
    beta2: float = field(default=0.95, validator=[ge(0), lt(1)])
    """Decay rate of the running mean of the squared gradient."""
    eps: float = field(default=1e-8, validator=ge(0))
    """Added to the denominator of the update."""
    weight_decay: float = field(default=0.1, validator=ge(0))
    """Each update subtracts learning rate times this times the weight from decayed weights."""
    decay: Literal["matrices", "all"] = "matrices"
    """Which parameters are decayed: those of two and more dimensions (embeddings too, but neither
    biases nor the gains of norms), or all."""
    amsgrad: bool = False
    """Divide by the largest running mean of squares so far instead of the current one (Reddi et
    al., 2018)."""
    fused: bool | None = None
    """Use one kernel for the whole update. By default if the device of the parameters has one."""
    groups: list[Group] = field(factory=list)
    """Groups of parameters with their own learning rate or weight decay."""

    @hookimpl
    def build_optimizer(self, run: Run) -> Optimizer:
        """Build PyTorch's optimizer for all parameters of the model, including frozen ones."""
        from torch import optim

        from fundamentallm_optimizers.param_groups import param_groups, use_fused

        return optim.AdamW(
            param_groups(run, self),
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            amsgrad=self.amsgrad,
            fused=use_fused(run, self),
        )


@plugin
class Adam:
    """Train with Adam; its weight decay is added to the gradient (`adamw` has decoupled decay).

    Kingma and Ba, "Adam: A Method for Stochastic Optimization" (2015, arXiv:1412.6980), with its
    defaults.
    """

    role = "optimizer"

    lr: float = field(default=1e-3, validator=gt(0))
    """The learning rate, before any schedule."""
    beta1: float = field(default=0.9, validator=[ge(0), lt(1)])
    """Decay rate of the running mean of the gradient."""
    beta2: float = field(default=0.999, validator=[ge(0), lt(1)])
    """Decay rate of the running mean of the squared gradient."""
    eps: float = field(default=1e-8, validator=ge(0))
    """Added to the denominator of the update."""
    weight_decay: float = field(default=0.0, validator=ge(0))
    """This times the weight is added to the gradient of decayed weights (an L2 penalty)."""
    decay: Literal["matrices", "all"] = "matrices"
    """Which parameters are decayed: those of two and more dimensions, or all."""
    amsgrad: bool = False
    """Divide by the largest running mean of squares so far instead of the current one (Reddi et
    al., 2018)."""
    fused: bool | None = None
    """Use one kernel for the whole update. By default if the device of the parameters has one."""
    groups: list[Group] = field(factory=list)
    """Groups of parameters with their own learning rate or weight decay."""

    @hookimpl
    def build_optimizer(self, run: Run) -> Optimizer:
        """Build PyTorch's optimizer for all parameters of the model, including frozen ones."""
        from torch import optim

        from fundamentallm_optimizers.param_groups import param_groups, use_fused

        return optim.Adam(
            param_groups(run, self),
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            amsgrad=self.amsgrad,
            fused=use_fused(run, self),
        )
