"""The shape of a transformer (its sizes and the choice of its parts), and published shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Preset: TypeAlias = Literal[
    "char",
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "smollm-135m",
    "smollm-360m",
    "smollm-1.7b",
    "tinyllama-1.1b",
    "llama-2-7b",
    "llama-3-8b",
]
Positions: TypeAlias = Literal["learned", "rope"]
Norm: TypeAlias = Literal["layernorm", "rmsnorm"]
Activation: TypeAlias = Literal["gelu", "gelu_tanh", "swiglu"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes and parts of a model, except its vocabulary, context and dropout.

    Raises ``ValueError`` (``"field: what is wrong"``) if the sizes do not fit together.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    d_model: int
    d_ff: int
    bias: bool
    tie_embeddings: bool
    positions: Positions
    rope_theta: float
    norm: Norm
    norm_eps: float
    activation: Activation
    qk_norm: bool
    init_std: float

    def __post_init__(self) -> None:
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model: {self.d_model} is not a multiple of num_heads, {self.num_heads}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: {self.num_kv_heads} does not divide num_heads, {self.num_heads}"
            )
        if self.positions == "rope" and self.head_width % 2:
            raise ValueError(
                f"d_model: rope rotates pairs, and d_model / num_heads is {self.head_width}, odd"
            )

    @property
    def head_width(self) -> int:
        """Width of one head's queries, keys and values."""
        return self.d_model // self.num_heads

    @property
    def qkv_widths(self) -> list[int]:
        """Widths of the queries, the keys and the values of all heads."""
        return [self.d_model, *[self.num_kv_heads * self.head_width] * 2]


DEFAULT: dict[str, Any] = {
    "num_layers": 4,
    "num_heads": 4,
    "d_model": 128,
    "bias": False,
    "tie_embeddings": True,
    "positions": "learned",
    "rope_theta": 10_000.0,
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "activation": "gelu",
    "qk_norm": False,
    "init_std": 0.02,
}

# Table 2 of Radford et al., "Language Models are Unsupervised Multitask Learners" (2019); the tanh
# form of GELU and the biases are those of the released weights.
_GPT2 = {"bias": True, "activation": "gelu_tanh"}

# Section 2.2 of Touvron et al., "LLaMA" (2023, arXiv:2302.13971).
_LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu"}

PRESETS: dict[Preset, dict[str, Any]] = {
    # nanoGPT's recipe for tiny Shakespeare on a CPU.
    "char": {"num_layers": 4, "num_heads": 4, "d_model": 128},
    "gpt2": _GPT2 | {"num_layers": 12, "num_heads": 12, "d_model": 768},
    "gpt2-medium": _GPT2 | {"num_layers": 24, "num_heads": 16, "d_model": 1024},
    "gpt2-large": _GPT2 | {"num_layers": 36, "num_heads": 20, "d_model": 1280},
    "gpt2-xl": _GPT2 | {"num_layers": 48, "num_heads": 25, "d_model": 1600},
    # The configurations published with the SmolLM weights (2024).
    "smollm-135m": _LLAMA
    | {"num_layers": 30, "num_heads": 9, "num_kv_heads": 3, "d_model": 576, "d_ff": 1536},
    "smollm-360m": _LLAMA
    | {"num_layers": 32, "num_heads": 15, "num_kv_heads": 5, "d_model": 960, "d_ff": 2560},
    "smollm-1.7b": _LLAMA
    | {"num_layers": 24, "num_heads": 32, "num_kv_heads": 32, "d_model": 2048, "d_ff": 8192},
    # Zhang et al., "TinyLlama" (2024, arXiv:2401.02385), section 2.2.
    "tinyllama-1.1b": _LLAMA
    | {"num_layers": 22, "num_heads": 32, "num_kv_heads": 4, "d_model": 2048, "d_ff": 5632}
    | {"tie_embeddings": False},
    # Touvron et al., "Llama 2" (2023, arXiv:2307.09288); d_ff as in the released weights.
    "llama-2-7b": _LLAMA
    | {"num_layers": 32, "num_heads": 32, "d_model": 4096, "d_ff": 11008}
    | {"tie_embeddings": False},
    # Table 3 of Grattafiori et al., "The Llama 3 Herd of Models" (2024, arXiv:2407.21783).
    "llama-3-8b": _LLAMA
    | {"num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "d_model": 4096, "d_ff": 14336}
    | {"tie_embeddings": False, "rope_theta": 500_000.0},
}


def shape_of(preset: Preset | None, chosen: dict[str, Any]) -> Shape:
    """Return the default shape, overridden by the preset, overridden by the chosen values.

    Raises ``ValueError`` (``"field: what is wrong"``) if the sizes do not fit together.
    """
    found = DEFAULT | (PRESETS[preset] if preset else {}) | chosen
    found.setdefault("num_kv_heads", found["num_heads"])
    found.setdefault("d_ff", _hidden_width(found["d_model"], found["activation"]))
    return Shape(**found)


def _hidden_width(d_model: int, activation: Activation) -> int:
    """Return four times the width, or the width of SwiGLU with as many weights."""
    if activation != "swiglu":
        return 4 * d_model
    # 8/3 of the width, as in Shazeer, "GLU Variants Improve Transformer" (2020, arXiv:2002.05202),
    # rounded up to a multiple of 64.
    return -(-8 * d_model // (3 * 64)) * 64
