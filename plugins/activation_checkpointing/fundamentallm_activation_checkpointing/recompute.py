"""Make blocks store only their inputs and run again in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fundamentallm import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from fundamentallm_activation_checkpointing import ActivationCheckpointing

# Compared by name: a build of torch may lack some of these operators.
_PRODUCTS = frozenset(
    f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm")
)
_ATTENTION = "scaled_dot_product"


def recompute(blocks: dict[str, nn.Module], settings: ActivationCheckpointing, plugin: str) -> None:
    """Replace the ``forward`` of the blocks in place; names and parameters do not change.

    ``plugin`` is the instance name that begins errors. Raises ``SettingsError`` for a block with
    running statistics, which a second forward pass would update again.
    """
    options: dict[str, Any] = {}
    if settings.mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, choose)
    chosen = list(blocks.items())[:: settings.every]
    for name, block in chosen:
        _check(name, block, plugin)
    for _, block in chosen:
        # A partial, since a deep copy of the model copies its arguments. A closure would go on
        # calling this block.
        block.forward = partial(_run, block, block.forward, options)


def _run(
    block: nn.Module,
    forward: Callable[..., Any],
    options: dict[str, Any],
    /,
    *inputs: Any,
    **named: Any,
) -> Any:
    # Without gradients nothing is stored, and torch.compile fails on a checkpoint in that case.
    if torch.compiler.is_compiling() and not _has_gradients(block, (inputs, named)):
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, **options, **named)


def _has_gradients(block: nn.Module, given: Any) -> bool:
    """Return whether there will be a backward pass through the block."""
    tensors = [*block.parameters(), *_tensors(given)]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, dict):
        given = tuple(given.values())
    if isinstance(given, tuple | list):
        return [tensor for one in given for tensor in _tensors(one)]
    return [given] if isinstance(given, Tensor) else []


def choose(context: object, operator: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    """Return the policy for an operator's result: store matrix products and attention."""
    name = operator.name()
    if name in _PRODUCTS or (_ATTENTION in name and not _drops(inputs, options)):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _drops(inputs: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Return whether an attention operator applies dropout, by the only float among its inputs.

    Such a result is not stored: the second pass would skip its random draw, and every later dropout
    would draw other numbers than in the first pass.
    """
    numbers = [value for value in inputs if isinstance(value, float)]
    return any([*numbers, options.get("dropout_p", 0.0)])


def _check(name: str, block: nn.Module, plugin: str) -> None:
    for inner, module in block.named_modules(prefix=name):
        if getattr(module, "track_running_stats", False):
            raise SettingsError(
                f"{plugin}: {inner} is a {type(module).__name__}; recomputing it would update "
                f"its running statistics twice; leave its block out of {plugin}.blocks"
            )
