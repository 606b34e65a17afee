"""Generating tokens: which ones may come next, which one does, and what the model sees of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fundamentallm import NotFiniteError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator


class LanguageModel(Protocol):
    """What a model must offer to be sampled from.

    A model may also have ``make_cache(batch_size, length)``; what that returns is then handed to
    ``logits(tokens, cache)``, which must continue what the cache has seen.
    """

    context_length: int

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the scores of every next token, (B, T, V), for ``tokens``, (B, T)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How the next token is chosen; see the settings of the same names."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def check_model(model: nn.Module) -> None:
    """Raise ``SettingsError`` if the model cannot be sampled from, saying what it lacks."""
    lacks = [] if callable(getattr(model, "logits", None)) else ["a method logits(tokens)"]
    if not isinstance(getattr(model, "context_length", None), int):
        lacks.append("an attribute context_length")
    if lacks:
        raise SettingsError(
            f"sample: cannot sample from {type(model).__name__}, which lacks {' and '.join(lacks)}"
        )


@torch.no_grad()
def generate(
    model: Any, prompt: Tensor, max_tokens: int, choice: Choice, source: torch.Generator
) -> Iterator[Tensor]:
    """Yield ``max_tokens`` times the next token of every sequence, (B,).

    ``prompt``: (B, T) int64 on the model's device, T at least 1; the model is a ``LanguageModel``
    in evaluation mode, and ``source`` is on its device too. Once the tokens fill the context, the
    oldest quarter of what the model sees is let go at once, so that a cache is rebuilt once in a
    quarter of a context instead of at every token. With or without a cache, the model sees the
    same tokens. Raises ``NotFiniteError`` if the model answers nonsense.
    """
    limit = model.context_length
    seen = prompt[:, -limit:]
    cached = hasattr(model, "make_cache")
    new, cache = seen, None
    for _ in range(max_tokens):
        if seen.shape[1] > limit:
            seen = seen[:, max(1, limit // 4) :]
            cache = None
        if not cached:
            scores = model.logits(seen)
        else:
            if cache is None:
                new, cache = seen, model.make_cache(len(seen), limit)
            scores = model.logits(new, cache)
        token = choose(scores[:, -1], choice, source)
        yield token
        new = token[:, None]
        seen = torch.cat((seen, new), dim=1)


def choose(scores: Tensor, choice: Choice, source: torch.Generator) -> Tensor:
    """Return one token for each row of ``scores``, (B, V) -> (B,).

    Temperature comes first, then ``top_k``, then ``top_p`` of what that leaves.
    """
    highest = scores.max(dim=-1, keepdim=True).values
    if not highest.isfinite().all():
        raise NotFiniteError("sample: the model's logits are not finite: the run has diverged")
    if choice.temperature == 0:
        return scores.argmax(dim=-1)
    # Relative to the highest, and not quite at 0, no temperature makes an infinity of it.
    scores = (scores - highest).float() / max(choice.temperature, 1e-6)
    if choice.top_k is not None:
        scores = keep_top_k(scores, choice.top_k)
    if choice.top_p is not None:
        scores = keep_top_p(scores, choice.top_p)
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=source).squeeze(1)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Set all but the ``k`` highest scores of each row, (B, V), to -inf.

    Exactly ``k`` stay, also among equals (as many as there are, if fewer).
    """
    highest = scores.topk(min(k, scores.shape[-1]), dim=-1)
    return torch.full_like(scores, -torch.inf).scatter(-1, highest.indices, highest.values)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Set all but the smallest set of tokens with probability ``p`` together to -inf.

    ``scores``: (B, V). At least one stays; among equals the first do. Holtzman et al., "The
    Curious Case of Neural Text Degeneration" (2020, arXiv:1904.09751), section 3.1.
    """
    if p >= 1:  # rounding could reach 1 before the last token
        return scores
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    mass = ordered.softmax(dim=-1).cumsum(dim=-1)
    # A token is left out if those before it suffice.
    ordered[..., 1:].masked_fill_(mass[..., :-1] >= p, -torch.inf)
    return torch.empty_like(scores).scatter(-1, order, ordered)
