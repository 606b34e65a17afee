"""Muon for the matrices inside a model, AdamW for the rest."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from fundamentallm import field, ge, gt, hookimpl, lt, optional, plugin, table

# Not under TYPE_CHECKING: the host reads the types of the fields when it checks settings.
from fundamentallm_optimizers.group import Group

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fundamentallm import Run

log = logging.getLogger("fundamentallm")


@table
class MuonAdamW:
    """Settings of AdamW for the parameters that Muon does not train."""

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
    """Train hidden matrices with Muon, and all other parameters with AdamW.

    A Muon update is the orthogonalized momentum (Jordan et al., "Muon: An optimizer for hidden
    layers in neural networks", 2024). AdamW trains embeddings, the output layer, biases and gains
    of norms. `adjust_lr_fn`: Liu et al., "Muon is Scalable for LLM Training" (2025,
    arXiv:2502.16982).
    """

    role = "optimizer"

    lr: float = field(default=6e-4, validator=gt(0))
    """The learning rate, before any schedule."""
    momentum: float = field(default=0.95, validator=[ge(0), lt(1)])
    """Decay rate of the running mean of the gradient."""
    nesterov: bool = True
    """Use Nesterov momentum."""
    ns_steps: int = field(default=5, validator=[ge(1), lt(100)])
    """Newton-Schulz iterations that orthogonalize the update."""
    eps: float = field(default=1e-7, validator=ge(0))
    """Lower bound of the norm that the momentum is divided by."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    """The factor of the learning rate for a matrix of rows x columns. "match_rms_adamw" is
    0.2 sqrt(max(rows, columns)), for AdamW's usual learning rates; "original" is
    sqrt(max(1, rows / columns)), for `lr` near 0.02 and AdamW's usual value for `adamw.lr`."""
    weight_decay: float = field(default=0.1, validator=ge(0))
    """Each update subtracts learning rate times this times the weight from decayed weights."""
    decay: Literal["matrices", "all"] = "matrices"
    """Which parameters are decayed: those of two and more dimensions (embeddings too, but neither
    biases nor the gains of norms), or all."""
    matrices: list[str] | None = None
    """Glob patterns on the names of the parameters that Muon trains, such as `"blocks.*"`; only
    parameters of two dimensions count. By default all of these except embeddings and output
    layers."""
    adamw: MuonAdamW = field(factory=MuonAdamW)
    """Settings of AdamW for the other parameters."""
    fused: bool | None = None
    """Use one kernel for AdamW's update. By default if the device of the parameters has one."""
    groups: list[Group] = field(factory=list)
    """Groups of parameters, Muon's or AdamW's, with their own learning rate or weight decay."""

    @hookimpl
    def build_optimizer(self, run: Run) -> Optimizer:
        """Build Muon and AdamW as one optimizer for all parameters, including frozen ones."""
        from torch import optim

        from fundamentallm_optimizers.combined import CombinedOptimizer
        from fundamentallm_optimizers.muon_groups import muon_and_adamw_groups
        from fundamentallm_optimizers.param_groups import is_divided, use_fused

        matrices, rest = muon_and_adamw_groups(run, self)
        count = sum(len(group["params"]) for group in matrices)
        log.info("Muon trains %d matrices, AdamW the other parameters", count)
        kind = optim.Muon
        if is_divided(run.model):
            from fundamentallm_optimizers.divided_muon import DividedMuon

            kind = DividedMuon
        muon = kind(
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
        return CombinedOptimizer([muon, adamw])
