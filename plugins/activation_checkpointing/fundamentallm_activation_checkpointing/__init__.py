"""Recompute activations in the backward pass instead of keeping them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fundamentallm import field, ge, hookimpl, plugin

if TYPE_CHECKING:
    from torch import nn

    from fundamentallm import Run

__all__ = ["ActivationCheckpointing"]


@plugin
class ActivationCheckpointing:
    """Keep of a block only what goes into it, and run it again when its gradients are computed.

    Memory for time (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016): the
    gradients are, to the last bit, those of a run without it, dropout included. Validation and
    sampling, which keep nothing anyway, are as they were.
    """

    mode: Literal["full", "selective"] = "full"
    """`full` recomputes all of a block; `selective` keeps the results of matrix products and
    attention, which cost most to compute, and recomputes the rest."""
    every: int = field(default=1, validator=ge(1))
    """Recompute the first of every so many blocks only: with 2, every other one."""
    blocks: list[str] | None = None
    """Globs on module names (`*` matches dots too) that say what a block is, such as
    `["encoder.layers.*"]`; of modules inside each other, the outer ones. By default the elements of
    the `nn.ModuleList` with the most parameters."""

    def __attrs_post_init__(self) -> None:
        if self.blocks == []:
            raise ValueError("blocks: is empty; leave it out for the largest list of modules")

    @hookimpl
    def checkpoint_activations(self, run: Run, model: nn.Module) -> nn.Module:
        """Make the blocks recompute themselves; the model stays the same object."""
        from fundamentallm_activation_checkpointing.blocks import find_blocks
        from fundamentallm_activation_checkpointing.recomputing import recompute

        names = (name for name, one in run.plugins.items() if one is self)
        name = next(names, "activation_checkpointing")
        recompute(find_blocks(model, self.blocks, name), self, name)
        return model
