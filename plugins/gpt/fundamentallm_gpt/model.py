"""The model from the top: ``GPT``, its ``Block``, the block's ``Attention`` and ``FeedForward``.

Shapes in comments: B sequences, T tokens, C = d_model, H heads, K heads of keys and values,
D = C / H, V = vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fundamentallm_gpt.kv_cache import KeyValueCache
from fundamentallm_gpt.rope import Rotation, rotate, rotation

if TYPE_CHECKING:
    from collections.abc import Callable

    from fundamentallm_gpt.shapes import Shape
    from fundamentallm_gpt.tensor_parallel import TensorParallelPlan


class GPT(nn.Module):
    """A decoder-only transformer with pre-normalization.

    Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3.
    ``vocab_size`` is the number of ids, ``context_length`` the longest sequence in tokens.
    """

    rope_cos: Tensor
    rope_sin: Tensor
    loss_chunks = 1
    """The number of parts in which the loss is computed."""

    def __init__(
        self,
        shape: Shape,
        *,
        vocab_size: int,
        context_length: int,
        dropout: float = 0.0,
        pad_vocab_to: int = 1,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.vocab_size = vocab_size
        self.context_length = context_length
        rows = -(-vocab_size // pad_vocab_to) * pad_vocab_to
        self.embed = nn.Embedding(rows, shape.d_model)
        self.positions = None
        if shape.positions == "learned":
            self.positions = nn.Embedding(context_length, shape.d_model)
        else:
            cos, sin = rotation(context_length, shape.head_width, shape.rope_theta)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(shape, dropout, layer) for layer in range(shape.num_layers)
        )
        self.norm = _norm(shape, shape.d_model)
        # A tied output layer has no parameter of its own, so a checkpoint stores the tensor once.
        self.head = None if shape.tie_embeddings else nn.Linear(shape.d_model, rows, bias=False)
        initialize(self)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats over the targets, a 0-d tensor.

        ``inputs`` and ``targets``: token ids, (B, T) int64, with T at most ``context_length``.
        Targets of -100 are ignored.
        """
        hidden = self._hidden(inputs, None)
        if self.loss_chunks > 1:
            return self._chunked_loss(hidden.flatten(0, 1), targets.flatten())
        return self._loss(hidden.flatten(0, 1), targets.flatten(), "mean")

    def logits(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Return the unnormalized log-probabilities of every next token, (B, T, V).

        ``tokens``: (B, T) int64. With a ``cache`` they continue the tokens in it, and are added
        to it. Raises ``ValueError`` if they exceed the context or the cache.
        """
        return _whole(self._scores(self._hidden(tokens, cache)))[..., : self.vocab_size]

    def make_cache(self, batch_size: int, length: int) -> KeyValueCache:
        """Return an empty cache for ``batch_size`` sequences of up to ``length`` tokens."""
        return KeyValueCache(batch_size, min(length, self.context_length))

    def num_parameters(self) -> int:
        """Return the number of parameters with embeddings; a tied one counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: int | None = None) -> int:
        """Return the number of floating-point operations of training on one token.

        ``length`` is the window in tokens (default: ``context_length``). The formula is that of
        Chowdhery et al., "PaLM" (2022, arXiv:2204.02311), appendix B: 6 per weight of a matrix
        product (2 forward, 4 backward), and 12 x layers x d_model x length for attention, including
        its masked half. Embedding lookups, norms and biases are not counted.
        """
        window = self.context_length if length is None else length
        output = self.embed.weight if self.head is None else self.head.weight
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2)
        attention = 12 * self.shape.num_layers * self.shape.d_model * window
        return 6 * (matrices + output.numel()) + attention

    def tensor_parallel_plan(self, size: int) -> TensorParallelPlan:
        """Return how to split the model over ``size`` processes; the model stays as it is.

        Raises ``SettingsError`` if its heads or its feed-forward layers cannot be split so.
        """
        from fundamentallm_gpt.tensor_parallel import plan

        return plan(self, size)

    def _hidden(self, tokens: Tensor, cache: KeyValueCache | None) -> Tensor:
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.context_length:
            raise ValueError(f"{end} tokens exceed the context_length, {self.context_length}")
        if cache is not None:
            cache.extend(tokens)
        x: Tensor = self.embed(tokens)
        angles: Rotation | None = None
        if self.positions is None:
            angles = self.rope_cos[start:end], self.rope_sin[start:end]
        else:
            x = x + self.positions.weight[start:end]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, angles, cache)
        return x

    def _loss(self, hidden: Tensor, targets: Tensor, reduction: str) -> Tensor:
        logits = self._scores(hidden)
        # A softmax over a vocabulary needs float32; float64 stays float64.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return _whole(
            nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction=reduction)
        )

    def _chunked_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss over tokens, (tokens, C); logits of one chunk only exist at a time.

        The backward pass computes the logits of a chunk again: Chen et al., "Training Deep Nets
        with Sublinear Memory Cost" (2016, arXiv:1604.06174).
        """
        chunks = zip(hidden.chunk(self.loss_chunks), targets.chunk(self.loss_chunks), strict=True)
        sums = [
            checkpoint(self._loss, *chunk, "sum", use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
        # As in the mean over all: NaN if no token has a target.
        mean: Tensor = torch.stack(sums).sum() / (targets != -100).sum()
        return mean

    def _scores(self, hidden: Tensor) -> Tensor:
        output = self.embed.weight if self.head is None else self.head.weight
        return nn.functional.linear(self.norm(hidden), output)


class Block(nn.Module):
    """Attention, then feed-forward; each adds its output to the residual stream."""

    def __init__(self, shape: Shape, dropout: float, layer: int) -> None:
        super().__init__()
        self.attention_norm = _norm(shape, shape.d_model)
        self.attention = Attention(shape, dropout, layer)
        self.mlp_norm = _norm(shape, shape.d_model)
        self.mlp = FeedForward(shape, dropout)

    def forward(self, x: Tensor, angles: Rotation | None, cache: KeyValueCache | None) -> Tensor:
        """Return the residual stream after this block, (B, T, C)."""
        x = x + self.attention(self.attention_norm(x), angles, cache)
        added: Tensor = self.mlp(self.mlp_norm(x))
        return x + added


class Attention(nn.Module):
    """Causal self-attention; with K < H grouped-query attention.

    Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
    Checkpoints" (2023, arXiv:2305.13245).
    """

    def __init__(self, shape: Shape, dropout: float, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.width = shape.head_width
        self.grouped = shape.num_kv_heads < shape.num_heads
        self.widths = shape.qkv_widths
        # One product for queries, keys and values, in this order.
        self.qkv = nn.Linear(shape.d_model, sum(self.widths), bias=shape.bias)
        self.out = nn.Linear(shape.d_model, shape.d_model, bias=shape.bias)
        # Henry et al., "Query-Key Normalization for Transformers" (2020, arXiv:2010.04245), with
        # learned norms.
        self.query_norm = _norm(shape, self.width) if shape.qk_norm else None
        self.key_norm = _norm(shape, self.width) if shape.qk_norm else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, angles: Rotation | None, cache: KeyValueCache | None) -> Tensor:
        """Return the attention output of each token over itself and earlier ones, (B, T, C)."""
        qkv: Tensor = self.qkv(x)
        # In tensor parallelism a process has the same part of the heads of each.
        widths = [width * qkv.shape[-1] // sum(self.widths) for width in self.widths]
        # (B, T, heads x D) -> (B, heads, T, D)
        query, key, value = (
            part.view(*part.shape[:2], -1, self.width).transpose(1, 2)
            for part in torch.split(qkv, widths, dim=-1)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        mask = None
        if cache is not None:
            key, value = cache.append(self.layer, key, value)
            mask = cache.mask
        seen = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout.p if self.training else 0.0,
            is_causal=cache is None or cache.is_causal,
            enable_gqa=self.grouped,
        )
        projected: Tensor = self.dropout(self.out(seen.transpose(1, 2).flatten(2)))
        return projected


class FeedForward(nn.Module):
    """A layer up, a non-linearity, a layer down; ``swiglu`` multiplies ``up`` with a gate.

    Shazeer, "GLU Variants Improve Transformer" (2020, arXiv:2002.05202).
    """

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(shape.d_model, shape.d_ff, bias=shape.bias)
        self.gate = None
        if shape.activation == "swiglu":
            self.gate = nn.Linear(shape.d_model, shape.d_ff, bias=shape.bias)
        self.down = nn.Linear(shape.d_ff, shape.d_model, bias=shape.bias)
        self.approximate = "tanh" if shape.activation == "gelu_tanh" else "none"
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feed-forward output of each token, (B, T, C)."""
        up: Tensor = self.up(x)
        if self.gate is None:
            inner = nn.functional.gelu(up, approximate=self.approximate)
        else:
            inner = nn.functional.silu(self.gate(x)) * up
        down: Tensor = self.dropout(self.down(inner))
        return down


def _whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, of which a process may have a part in tensor parallelism."""
    collect: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if collect is None else collect()


def _norm(shape: Shape, width: int) -> nn.Module:
    if shape.norm == "rmsnorm":
        return nn.RMSNorm(width, eps=shape.norm_eps)
    return nn.LayerNorm(width, eps=shape.norm_eps, bias=shape.bias)


def initialize(model: GPT) -> None:
    """Draw the initial weights from torch's global generator, as GPT-2 does.

    Matrices and embeddings are normal with standard deviation ``init_std``, the output matrices of
    attention and feed-forward with ``init_std / sqrt(2 x layers)``; biases are 0 and norms 1.
    Radford et al. (2019), section 2.3, with the 0.02 of the released code. That code draws position
    embeddings with 0.01; here they get ``init_std`` too.
    """
    std = model.shape.init_std
    residual = std / math.sqrt(2 * model.shape.num_layers)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            writes = name.endswith((".attention.out.weight", ".mlp.down.weight"))
            nn.init.normal_(parameter, std=residual if writes else std)
        elif name.endswith(".bias"):
            nn.init.zeros_(parameter)
