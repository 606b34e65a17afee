"""Build a decoder-only transformer, with the shapes of GPT-2, Llama and similar models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from fundamentallm import SettingsError, field, ge, gt, hookimpl, in_, lt, optional, plugin

# Not under TYPE_CHECKING: the host reads the types of the fields when it checks settings.
from fundamentallm_gpt.shapes import (
    DEFAULT,
    Activation,
    Norm,
    Positions,
    Preset,
    Shape,
    shape_of,
)

if TYPE_CHECKING:
    from fundamentallm import Data, Run
    from fundamentallm_gpt.model import GPT

__all__ = ["Gpt"]


@plugin
class Gpt:
    """Build a decoder-only transformer for the vocabulary of the data.

    Without settings the model has 4 layers, width 128 and GPT-2's parts, which is enough to learn
    characters on a CPU. Parts that neither a preset nor a setting chooses are GPT-2's.
    """

    role = "model"
    # Settings that may differ when a run is resumed, since the weights keep their shapes.
    free = ("dropout", "init_std", "loss_chunks")

    preset: Preset | None = field(default=None, validator=optional(in_(get_args(Preset))))
    """A published shape; each setting below replaces that part of it."""

    context_length: int | None = field(default=None, validator=optional(ge(1)))
    """The longest sequence in tokens. By default the data's ``context_length``."""

    num_layers: int | None = field(default=None, validator=optional(ge(1)))
    """The number of transformer blocks. By default the preset's, or 4."""

    num_heads: int | None = field(default=None, validator=optional(ge(1)))
    """The number of attention heads; must divide ``d_model``. By default the preset's, or 4."""

    num_kv_heads: int | None = field(default=None, validator=optional(ge(1)))
    """The number of heads of keys and values. Fewer than ``num_heads`` is grouped-query attention;
    must divide ``num_heads``. By default the preset's, or ``num_heads``."""

    d_model: int | None = field(default=None, validator=optional(ge(1)))
    """The width of the residual stream. By default the preset's, or 128."""

    d_ff: int | None = field(default=None, validator=optional(ge(1)))
    """The hidden width of the feed-forward layers. By default the preset's, or 4 times ``d_model``,
    with ``swiglu`` 8/3 times, rounded up to a multiple of 64."""

    dropout: float = field(default=0.0, validator=[ge(0), lt(1)])
    """The probability of dropping an embedding, an attention weight or a block's output."""

    bias: bool | None = None
    """Whether linear layers and layer norms have biases. By default the preset's, or false."""

    tie_embeddings: bool | None = None
    """Whether the output layer is the token embedding. By default the preset's, or true."""

    positions: Positions | None = field(default=None, validator=optional(in_(("learned", "rope"))))
    """``learned`` is an embedding per position; ``rope`` rotates queries and keys by position.
    By default the preset's, or ``learned``."""

    rope_theta: float | None = field(default=None, validator=optional(gt(0)))
    """The base of the wavelengths of ``rope``. By default the preset's, or 10000."""

    norm: Norm | None = field(default=None, validator=optional(in_(get_args(Norm))))
    """The normalization before attention, feed-forward and output. By default the preset's, or
    ``layernorm``."""

    norm_eps: float | None = field(default=None, validator=optional(gt(0)))
    """A constant that norms add to the variance. By default the preset's, or 1e-5."""

    activation: Activation | None = field(
        default=None, validator=optional(in_(get_args(Activation)))
    )
    """The non-linearity of the feed-forward layers; ``gelu_tanh`` is GPT-2's approximation of
    ``gelu``. By default the preset's, or ``gelu``."""

    qk_norm: bool | None = None
    """Whether the queries and keys of each head are normalized, which keeps training stable at
    large learning rates. By default the preset's, or false."""

    init_std: float | None = field(default=None, validator=optional(gt(0)))
    """The standard deviation of the initial matrices; for the output matrices of attention and
    feed-forward it is divided by sqrt(2 x ``num_layers``). By default the preset's, or 0.02."""

    pad_vocab_to_multiple_of: int = field(default=1, validator=ge(1))
    """Round the rows of the embedding up to a multiple of this, such as 64, for speed on GPUs. The
    model never predicts the additional rows."""

    loss_chunks: int = field(default=1, validator=ge(1))
    """Compute the scores of the vocabulary and the loss in this many parts of the tokens, so that
    the scores of one part only are in memory. Above 1, the backward pass computes them again."""

    def __attrs_post_init__(self) -> None:
        shape = self.shape()
        if self.rope_theta is not None and shape.positions != "rope":
            raise ValueError(f"rope_theta: has no effect with positions = {shape.positions!r}")

    def shape(self) -> Shape:
        """Return the shape from the preset and the settings."""
        names = [*DEFAULT, "num_kv_heads", "d_ff"]
        chosen: dict[str, Any] = {name: getattr(self, name) for name in names}
        return shape_of(self.preset, {k: v for k, v in chosen.items() if v is not None})

    @hookimpl
    def build_model(self, run: Run) -> GPT:
        """Build the transformer, with initial weights like GPT-2's."""
        from fundamentallm_gpt.model import GPT

        model = GPT(
            self.shape(),
            vocab_size=_from_data(run.data, "vocab_size"),
            context_length=self._context_length(run.data),
            dropout=self.dropout,
            pad_vocab_to=self.pad_vocab_to_multiple_of,
        )
        model.loss_chunks = self.loss_chunks
        return model

    def _context_length(self, data: Data) -> int:
        if self.context_length is None:
            return _from_data(data, "context_length")
        longest: int = getattr(data, "context_length", 0)
        if self.context_length < longest:
            raise SettingsError(
                f"gpt.context_length: {self.context_length} is shorter than the windows of the "
                f"data, {longest} tokens: increase it, leave it out, or reduce the data's"
            )
        return self.context_length


def _from_data(data: Data, name: str) -> int:
    found = getattr(data, name, None)
    if not isinstance(found, int):
        raise SettingsError(
            f"gpt: the data ({type(data).__name__}) has no {name}: this model needs data of tokens "
            f"with vocab_size and context_length; list such a plugin, for example 'text'"
        )
    return found
