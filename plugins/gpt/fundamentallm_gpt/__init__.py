"""A decoder-only transformer, from GPT-2 to Llama shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from fundamentallm import SettingsError, field, ge, gt, hookimpl, in_, lt, optional, plugin

# Not under TYPE_CHECKING: the types of the fields are read when settings are checked.
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

    Without settings it is a model of 4 layers and width 128 with GPT-2's parts, which learns
    characters on a CPU. What a preset or a setting does not say is GPT-2's way.
    """

    role = "model"

    free = ("dropout", "init_std")  # what a resumed run may set anew: the weights' shapes stay

    preset: Preset | None = field(default=None, validator=optional(in_(get_args(Preset))))
    """A published shape to start from; each setting below that is given replaces its part of it."""

    context_length: int | None = field(default=None, validator=optional(ge(1)))
    """Tokens that the model can see at once. By default the data's ``context_length``."""

    num_layers: int | None = field(default=None, validator=optional(ge(1)))
    """Transformer blocks. By default the preset's, or 4."""

    num_heads: int | None = field(default=None, validator=optional(ge(1)))
    """Attention heads; must divide ``d_model``. By default the preset's, or 4."""

    num_kv_heads: int | None = field(default=None, validator=optional(ge(1)))
    """Heads of keys and values, each shared by several heads of queries (grouped-query attention);
    must divide ``num_heads``. By default the preset's, or ``num_heads``."""

    d_model: int | None = field(default=None, validator=optional(ge(1)))
    """Width of the residual stream. By default the preset's, or 128."""

    d_ff: int | None = field(default=None, validator=optional(ge(1)))
    """Width inside the feed-forward part. By default the preset's, or 4 times ``d_model``; with
    ``swiglu`` 8/3 times, rounded up to a multiple of 64."""

    dropout: float = field(default=0.0, validator=[ge(0), lt(1)])
    """Probability of dropping an embedding, an attention weight or a block's output."""

    bias: bool | None = None
    """Whether linear layers and layer norms have biases. By default the preset's, or false."""

    tie_embeddings: bool | None = None
    """Whether the output layer is the token embedding. By default the preset's, or true."""

    positions: Positions | None = field(default=None, validator=optional(in_(("learned", "rope"))))
    """``learned``: an embedding per position; ``rope``: queries and keys turned by their position.
    By default the preset's, or ``learned``."""

    rope_theta: float | None = field(default=None, validator=optional(gt(0)))
    """Base of the wavelengths of ``rope``. By default the preset's, or 10000."""

    norm: Norm | None = field(default=None, validator=optional(in_(get_args(Norm))))
    """Normalization before attention, feed-forward and output. By default the preset's, or
    ``layernorm``."""

    norm_eps: float | None = field(default=None, validator=optional(gt(0)))
    """Added to the variance in norms. By default the preset's, or 1e-5."""

    activation: Activation | None = field(
        default=None, validator=optional(in_(get_args(Activation)))
    )
    """Non-linearity of the feed-forward part; ``gelu_tanh`` is GPT-2's approximation of ``gelu``.
    By default the preset's, or ``gelu``."""

    qk_norm: bool | None = None
    """Whether queries and keys are normalized head by head, which keeps large learning rates
    stable. By default the preset's, or false."""

    init_std: float | None = field(default=None, validator=optional(gt(0)))
    """Standard deviation of the initial matrices; those that write to the residual stream get it
    divided by the square root of twice ``num_layers``. By default the preset's, or 0.02."""

    pad_vocab_to_multiple_of: int = field(default=1, validator=ge(1))
    """Round the embedding up to this many rows, which makes it faster on GPUs (64, say). The model
    never predicts the rows beyond the vocabulary."""

    def __attrs_post_init__(self) -> None:
        shape = self.shape()
        if self.rope_theta is not None and shape.positions != "rope":
            raise ValueError(f"rope_theta: has no effect with positions = {shape.positions!r}")

    def shape(self) -> Shape:
        """Return the shape that preset and settings make together."""
        names = [*DEFAULT, "num_kv_heads", "d_ff"]
        chosen: dict[str, Any] = {name: getattr(self, name) for name in names}
        return shape_of(self.preset, {k: v for k, v in chosen.items() if v is not None})

    @hookimpl
    def build_model(self, run: Run) -> GPT:
        """Make the transformer, with GPT-2's initial weights."""
        from fundamentallm_gpt.model import GPT

        return GPT(
            self.shape(),
            vocab_size=_from_data(run.data, "vocab_size"),
            context_length=self._context_length(run.data),
            dropout=self.dropout,
            pad_vocab_to=self.pad_vocab_to_multiple_of,
        )

    def _context_length(self, data: Data) -> int:
        if self.context_length is None:
            return _from_data(data, "context_length")
        longest: int = getattr(data, "context_length", 0)
        if self.context_length < longest:
            raise SettingsError(
                f"gpt.context_length: {self.context_length} is shorter than the windows of the "
                f"data, {longest} tokens: raise it, leave it out, or shorten the data's"
            )
        return self.context_length


def _from_data(data: Data, name: str) -> int:
    found = getattr(data, name, None)
    if not isinstance(found, int):
        raise SettingsError(
            f"gpt: the data ({type(data).__name__}) does not say its {name}: this model needs data "
            f"made of tokens, with vocab_size and context_length (the 'text' plugin's, say)"
        )
    return found
