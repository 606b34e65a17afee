"""Muon for the matrices inside a model, AdamW for the rest."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from fundamentallm import SettingsError, field, ge, gt, hookimpl, lt, optional, plugin, table

# Not under TYPE_CHECKING: the types of the fields are read when settings are checked.
from fundamentallm_optimizers.groups import Group

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fundamentallm import Run

log = logging.getLogger("fundamentallm")


@table
class Rest:
    """How AdamW trains what Muon does not."""

    lr: float | None = field(default=None, validator=optional(gt(0)))
    """AdamW's learning rate, before any schedule; by default Muon's."""
    beta1: float = field(default=0.9, validator=[ge(0), lt(1)])
    """Decay rate of AdamW's running mean of the gradient."""
    beta2: float = field(default=0.95, validator=[ge(0), lt(1)])
    """Decay rate of AdamW's running mean of the squared gradient."""
    eps: float = field(default=1e-8, validator=ge(0))
    """Added to the denominator of AdamW's update."""
    weight_decay: float | None = field(default=None, validator=optional(ge(0)))
    """AdamW's weight decay; by default Muon's."""


@plugin
class Muon:
    """Muon for the matrices inside the model: the update is the momentum, made orthogonal. AdamW
    trains the rest: embeddings, the head, biases and gains of norms.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); `adjust_lr_fn`:
    Liu et al., "Muon is Scalable for LLM Training" (arXiv:2502.16982). Needs PyTorch 2.9 or newer.
    """

    lr: float = field(default=6e-4, validator=gt(0))
    """The learning rate, before any schedule."""
    momentum: float = field(default=0.95, validator=[ge(0), lt(1)])
    """Decay rate of the running mean of the gradient."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    ns_steps: int = field(default=5, validator=[ge(1), lt(100)])
    """Newton-Schulz rounds that make the update orthogonal."""
    eps: float = field(default=1e-7, validator=ge(0))
    """The least norm that the momentum is divided by."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    """How the learning rate depends on a matrix's shape, rows x columns: "match_rms_adamw" is
    0.2 sqrt(max(rows, columns)), for learning rates as AdamW has them; "original" is
    sqrt(max(1, rows / columns)), for some 0.02 here and AdamW's usual one for `adamw.lr`."""
    weight_decay: float = field(default=0.1, validator=ge(0))
    """Each update shrinks the decayed weights by learning rate times this."""
    decay: Literal["matrices", "all"] = "matrices"
    """What is decayed: tensors of two and more dimensions (embeddings too, but neither biases nor
    gains of norms), or everything."""
    matrices: list[str] | None = None
    """Globs on the names of the parameters that Muon trains, such as `"blocks.*"`, as far as they
    have two dimensions. By default all that do, but for embeddings, heads and output layers."""
    adamw: Rest = field(factory=Rest)
    """How AdamW trains the other parameters."""
    fused: bool | None = None
    """One kernel for AdamW's update; by default wherever the parameters' device has one."""
    groups: list[Group] = field(factory=list)
    """Parameters with a learning rate or weight decay of their own, Muon's or AdamW's."""

    @hookimpl
    def build_optimizer(self, run: Run) -> Optimizer:
        """Make the two optimizers, as one, for all the model's parameters, frozen ones too."""
        import torch
        from torch import optim

        from fundamentallm_optimizers.matrices import divide_in_two
        from fundamentallm_optimizers.parameters import use_fused
        from fundamentallm_optimizers.together import Together

        if not hasattr(optim, "Muon"):
            raise SettingsError(f"muon needs PyTorch 2.9 or newer; this is {torch.__version__}")
        matrices, rest = divide_in_two(run, self)
        count = sum(len(group["params"]) for group in matrices)
        log.info("Muon trains %d matrices, AdamW the other parameters", count)
        muon = optim.Muon(
            matrices,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.ns_steps,
            eps=self.eps,
            adjust_lr_fn=self.adjust_lr_fn,
        )
        if not rest:
            return muon
        betas = (self.adamw.beta1, self.adamw.beta2)
        adamw = optim.AdamW(rest, betas=betas, eps=self.adamw.eps, fused=use_fused(run, self))
        return Together([muon, adamw])
