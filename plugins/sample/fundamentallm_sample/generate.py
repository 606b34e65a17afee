"""Generate tokens: filter the candidates, choose one, and manage the model's context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fundamentallm import NotFiniteError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator


class LanguageModel(Protocol):
    """The methods that a model needs to be sampled from.

    A model may also have ``make_cache(batch_size, length)``. Its result is then passed to
    ``logits(tokens, cache)``, which must continue the tokens in the cache.
    """

    context_length: int

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the scores of every next token, (B, T, V), for ``tokens``, (B, T)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How to choose the next token; see the settings of the same names."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def check_model(model: nn.Module) -> None:
    """Raise ``SettingsError`` with the missing parts if the model cannot be sampled from."""
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
    """Yield the next token of every sequence, (B,) int64, ``max_tokens`` times.

    ``prompt``: (B, T) int64 on the model's device, T at least 1. ``model`` is a ``LanguageModel``
    in evaluation mode, and ``source`` is on its device. Once the tokens fill the context, the
    oldest quarter is dropped at once, so that a cache is rebuilt once per quarter of a context
    instead of at every token. The model gets the same tokens with or without a cache. Raises
    ``NotFiniteError`` if its logits are not finite.
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

    The temperature is applied first, then ``top_k``, then ``top_p`` to the remaining tokens.
    """
    highest = scores.max(dim=-1, keepdim=True).values
    if not highest.isfinite().all():
        raise NotFiniteError("sample: the model's logits are not finite: the run has diverged")
    if choice.temperature == 0:
        return scores.argmax(dim=-1)
    # Relative to the highest score and bounded below, so that no temperature overflows.
    scores = (scores - highest).float() / max(choice.temperature, 1e-6)
    if choice.top_k is not None:
        scores = keep_top_k(scores, choice.top_k)
    if choice.top_p is not None:
        scores = keep_top_p(scores, choice.top_p)
    return torch.multinomial(scores.softmax(dim=-1), 1, generator=source).squeeze(1)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Set all but the ``k`` highest scores of each row, (B, V), to -inf.

    Exactly ``k`` remain, also among equal scores (all, if there are fewer). Fan, Lewis and Dauphin,
    "Hierarchical Neural Story Generation" (2018, arXiv:1805.04833), section 5.4.
    """
    highest = scores.topk(min(k, scores.shape[-1]), dim=-1)
    return torch.full_like(scores, -torch.inf).scatter(-1, highest.indices, highest.values)


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Set all scores, (B, V), but the smallest set with a total probability of ``p`` to -inf.

    At least one remains; among equal scores the first ones do. Holtzman et al., "The
    Curious Case of Neural Text Degeneration" (2020, arXiv:1904.09751), section 3.1.
    """
    if p >= 1:  # by rounding, the sum could reach 1 before the last token
        return scores
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    mass = ordered.softmax(dim=-1).cumsum(dim=-1)
    # A token is excluded if the tokens before it reach the probability.
    ordered[..., 1:].masked_fill_(mass[..., :-1] >= p, -torch.inf)
    return torch.empty_like(scores).scatter(-1, order, ordered)
