"""Recompute activations in the backward pass instead of storing them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fundamentallm import field, find_blocks, ge, hookimpl, plugin

if TYPE_CHECKING:
    from torch import nn

    from fundamentallm import Run

__all__ = ["ActivationCheckpointing"]


@plugin
class ActivationCheckpointing:
    """Store only the inputs of each block, and run the block again in the backward pass.

    This trades time for memory (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016,
    arXiv:1604.06174). The gradients are bit-identical to those of a run without it, also with
    dropout. Validation and sampling are unchanged, since they store no activations.
    """

    role = "training"
    # A resumed run may add, change or remove it: the gradients are the same bits.
    free = ("*",)

    mode: Literal["full", "selective"] = "full"
    """`full` recomputes the whole block; `selective` stores the results of matrix products and
    attention, which cost most to compute, and recomputes the rest."""
    every: int = field(default=1, validator=ge(1))
    """Recompute only the first of every so many blocks: 2 recomputes every other block."""
    blocks: list[str] | None = None
    """Glob patterns on module names that select the blocks (`*` also matches dots), such as
    `["encoder.layers.*"]`; of nested matches only the outer modules count. By default the elements
    of the `nn.ModuleList` with the most parameters."""

    def __attrs_post_init__(self) -> None:
        if self.blocks == []:
            raise ValueError("blocks: is empty; leave it out for the largest list of modules")

    @hookimpl
    def checkpoint_activations(self, run: Run, model: nn.Module) -> nn.Module:
        """Replace the forward of the blocks by one that recomputes; the model stays the same."""
        from fundamentallm_activation_checkpointing.recompute import recompute

        name = run.name_of(self)
        recompute(find_blocks(model, self.blocks, f"{name}.blocks"), self, name)
        return model
