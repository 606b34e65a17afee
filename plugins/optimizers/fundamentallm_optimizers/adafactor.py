"""Adafactor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fundamentallm import SettingsError, field, ge, gt, hookimpl, le, optional, plugin

# Not under TYPE_CHECKING: the host reads the types of the fields when it checks settings.
from fundamentallm_optimizers.group import Group

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fundamentallm import Run


@plugin
class Adafactor:
    """Train with Adafactor, which stores a row and a column instead of a matrix of mean squares.

    Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost" (2018,
    arXiv:1804.04235). The defaults are PyTorch's, whose documentation lists the differences to the
    paper.
    """

    role = "optimizer"

    lr: float = field(default=1e-2, validator=gt(0))
    """The largest size of an update, relative to the root mean square of the tensor's weights and
    before any schedule. Update t uses min(lr, 1/sqrt(t))."""
    beta2_decay: float = field(default=-0.8, validator=le(0))
    """At update t the decay rate of the running mean of squared gradients is 1 - t ** this."""
    eps1: float | None = field(default=None, validator=optional(ge(0)))
    """Lower bound of the update's denominator. By default the machine epsilon of the weights'
    type."""
    eps2: float = field(default=1e-3, validator=ge(0))
    """Lower bound of the weights' root mean square, so that weights of zero can change."""
    clip_threshold: float = field(default=1.0, validator=ge(1))
    """Largest root mean square of an update; a larger one is scaled down to it (`d` in PyTorch)."""
    weight_decay: float = field(default=0.0, validator=ge(0))
    """Each update subtracts learning rate times this times the weight from decayed weights."""
    decay: Literal["matrices", "all"] = "matrices"
    """Which parameters are decayed: those of two and more dimensions, or all."""
    foreach: bool = False
    """Update all tensors together. This is faster on a GPU, and temporarily needs as much memory as
    the weights."""
    groups: list[Group] = field(factory=list)
    """Groups of parameters with their own learning rate or weight decay."""

    @hookimpl
    def build_optimizer(self, run: Run) -> Optimizer:
        """Build PyTorch's optimizer for all parameters of the model, including frozen ones."""
        from torch import optim

        from fundamentallm_optimizers.param_groups import is_divided, param_groups

        if is_divided(run.model):
            raise SettingsError(
                f"{run.name_of(self)}: PyTorch's Adafactor cannot train weights that are divided "
                f"among processes; list 'adamw' in its place, or 'ddp' in place of 'fsdp'"
            )
        return optim.Adafactor(
            param_groups(run, self),
            beta2_decay=self.beta2_decay,
            eps=(self.eps1, self.eps2),
            d=self.clip_threshold,
            foreach=self.foreach,
        )
