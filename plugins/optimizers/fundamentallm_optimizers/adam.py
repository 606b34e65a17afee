"""AdamW and Adam."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fundamentallm import field, ge, gt, hookimpl, lt, plugin

# Not under TYPE_CHECKING: the types of the fields are read when settings are checked.
from fundamentallm_optimizers.groups import Group

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fundamentallm import Run


@plugin
class AdamW:
    """Adam with decoupled weight decay; the defaults are those that GPT-3 was trained with.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019). The defaults: Brown et
    al., "Language Models are Few-Shot Learners" (2020), appendix B, and for `lr` the smallest
    model of its table 2.1.
    """

    lr: float = field(default=6e-4, validator=gt(0))
    """The learning rate, before any schedule."""
    beta1: float = field(default=0.9, validator=[ge(0), lt(1)])
    """Decay rate of the running mean of the gradient."""
    beta2: float = field(default=0.95, validator=[ge(0), lt(1)])
    """Decay rate of the running mean of the squared gradient."""
    eps: float = field(default=1e-8, validator=ge(0))
    """Added to the denominator of the update."""
    weight_decay: float = field(default=0.1, validator=ge(0))
    """Each update shrinks the decayed weights by learning rate times this."""
    decay: Literal["matrices", "all"] = "matrices"
    """What is decayed: tensors of two and more dimensions (embeddings too, but neither biases nor
    gains of norms), or everything."""
    amsgrad: bool = False
    """Divide by the largest running mean of squares so far instead of the current one."""
    fused: bool | None = None
    """One kernel for the whole update; by default wherever the parameters' device has one."""
    groups: list[Group] = field(factory=list)
    """Parameters with a learning rate or weight decay of their own."""

    @hookimpl
    def build_optimizer(self, run: Run) -> Optimizer:
        """Make PyTorch's optimizer for the groups of the model's parameters, frozen ones too."""
        from torch import optim

        from fundamentallm_optimizers.parameters import divide, use_fused

        return optim.AdamW(
            divide(run, self),
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            amsgrad=self.amsgrad,
            fused=use_fused(run, self),
        )


@plugin
class Adam:
    """Adam; its weight decay is added to the gradient (see `adamw` for decoupled decay).

    Kingma and Ba, "Adam: A Method for Stochastic Optimization" (2015), with its defaults.
    """

    lr: float = field(default=1e-3, validator=gt(0))
    """The learning rate, before any schedule."""
    beta1: float = field(default=0.9, validator=[ge(0), lt(1)])
    """Decay rate of the running mean of the gradient."""
    beta2: float = field(default=0.999, validator=[ge(0), lt(1)])
    """Decay rate of the running mean of the squared gradient."""
    eps: float = field(default=1e-8, validator=ge(0))
    """Added to the denominator of the update."""
    weight_decay: float = field(default=0.0, validator=ge(0))
    """This times the weight is added to the gradient of the decayed weights."""
    decay: Literal["matrices", "all"] = "matrices"
    """What is decayed: tensors of two and more dimensions, or everything."""
    amsgrad: bool = False
    """Divide by the largest running mean of squares so far instead of the current one."""
    fused: bool | None = None
    """One kernel for the whole update; by default wherever the parameters' device has one."""
    groups: list[Group] = field(factory=list)
    """Parameters with a learning rate or weight decay of their own."""

    @hookimpl
    def build_optimizer(self, run: Run) -> Optimizer:
        """Make PyTorch's optimizer for the groups of the model's parameters, frozen ones too."""
        from torch import optim

        from fundamentallm_optimizers.parameters import divide, use_fused

        return optim.Adam(
            divide(run, self),
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            amsgrad=self.amsgrad,
            fused=use_fused(run, self),
        )
