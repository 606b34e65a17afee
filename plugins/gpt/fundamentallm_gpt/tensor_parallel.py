"""Tensor parallelism: the part of each layer that each of several processes computes.

Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism" (2019, arXiv:1909.08053), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    RowwiseParallel,
)

from fundamentallm import SettingsError

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

    from fundamentallm_gpt.model import GPT
    from fundamentallm_gpt.shapes import Shape


@dataclass(frozen=True)
class TensorParallelPlan:
    """How to split a model over processes, which then compute its loss together.

    Each process gets the same tokens and the same random numbers. The residual stream is the same
    in all of them.
    """

    styles: dict[str, ParallelStyle]
    """Styles by pattern of module names, for ``torch.distributed.tensor.parallel``'s
    ``parallelize_module``. They split some parameters. The others must become replicated
    ``DTensor`` parameters."""

    row_order: dict[str, Tensor]
    """Orders of rows by parameter name. ``whole[order]`` is the tensor to split, and
    ``joined[order.argsort()]`` is the whole tensor again. A tensor of the optimizer that has the
    shape of the parameter has its order, too. Parameters without an entry are split as they are."""


def plan(model: GPT, size: int) -> TensorParallelPlan:
    """Return how to split a model over ``size`` processes.

    Raises ``SettingsError`` if ``num_kv_heads`` or ``d_ff`` is not a multiple of ``size``.
    """
    shape = model.shape
    _check(shape, size)
    rows = _rows_by_process(shape, size)
    return TensorParallelPlan(
        styles=_outer_styles(shape) | _block_styles(shape),
        # Also what a plugin has added to the layer, such as the matrix of an adapter.
        row_order={
            name: rows
            for name, parameter in model.named_parameters()
            if ".attention.qkv." in name and len(parameter) == len(rows)
        },
    )


def _check(shape: Shape, size: int) -> None:
    common = math.gcd(shape.num_kv_heads, shape.d_ff)
    if common % size:
        possible = [str(number) for number in range(1, common + 1) if common % number == 0]
        raise SettingsError(
            f"gpt: the model cannot be split over {size} processes: num_kv_heads, "
            f"{shape.num_kv_heads}, and d_ff, {shape.d_ff}, must be multiples of that number; "
            f"possible numbers are {', '.join(possible)}"
        )


def _rows_by_process(shape: Shape, size: int) -> Tensor:
    """Return the rows of queries, keys and values in the order of the processes.

    The part of each process then has the order of the whole: its queries, its keys, its values.
    """
    widths = shape.qkv_widths
    parts = [
        rows.chunk(size) for rows in torch.split(torch.arange(sum(widths), device="cpu"), widths)
    ]
    return torch.cat([part for of_one in zip(*parts, strict=True) for part in of_one])


def _outer_styles(shape: Shape) -> dict[str, ParallelStyle]:
    """Return the styles outside of the blocks. The output layer is split by token."""
    same = Replicate()
    # Without position embeddings, no operation would wait for an all-reduce of the embedding
    # before the first block, which fails if it is compiled. Two collectives with the same traffic
    # end with a tensor that is complete.
    embedded = same if shape.positions == "learned" else Shard(-1)
    # Split by token, the gradient of a lookup would be a whole matrix in each process.
    style = RowwiseParallel if shape.tie_embeddings else ColwiseParallel
    found: dict[str, ParallelStyle] = {
        # A DTensor until the position embedding, a parameter that no module reads, is added.
        "embed": style(input_layouts=same, output_layouts=embedded, use_local_output=False),
        "dropout": PrepareModuleInput(
            input_layouts=embedded, desired_input_layouts=same, use_local_output=True
        ),
        # A DTensor until the loss, since only loss_parallel knows how to normalize split scores.
        "norm": _norm_style(same, use_local_output=False),
    }
    if not shape.tie_embeddings:
        found["head"] = ColwiseParallel()
    return found


def _block_styles(shape: Shape) -> dict[str, ParallelStyle]:
    found: dict[str, ParallelStyle] = {
        "blocks.*.attention_norm": _norm_style(Replicate()),
        "blocks.*.attention.qkv": ColwiseParallel(),
        "blocks.*.attention.out": RowwiseParallel(),
        "blocks.*.mlp_norm": _norm_style(Replicate()),
        "blocks.*.mlp.up": ColwiseParallel(),
        "blocks.*.mlp.down": RowwiseParallel(),
    }
    if shape.activation == "swiglu":
        found["blocks.*.mlp.gate"] = ColwiseParallel()
    if shape.qk_norm:
        # (B, heads, T, D): the gradient of a norm is the sum over the heads of all processes.
        found["blocks.*.attention.query_norm"] = _norm_style(Shard(1))
        found["blocks.*.attention.key_norm"] = _norm_style(Shard(1))
    return found


def _norm_style(layout: Placement, *, use_local_output: bool = True) -> ParallelStyle:
    """Return the style of a norm, whose parameters are the same in all processes."""
    return PrepareModuleInputOutput(
        input_layouts=layout,
        desired_input_layouts=layout,
        output_layouts=layout,
        desired_output_layouts=layout,
        use_local_output=use_local_output,
    )
