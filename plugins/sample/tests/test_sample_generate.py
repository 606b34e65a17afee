"""Choosing tokens, and what the model sees while a text grows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fundamentallm import NotFiniteError, SettingsError
from fundamentallm_sample.generate import (
    Choice,
    check_model,
    choose,
    generate,
    keep_top_k,
    keep_top_p,
)

# Few distinct values, so that ties are common.
rows = st.lists(
    st.lists(st.sampled_from([-30.0, -2.0, -0.5, 0.0, 0.25, 1.0, 3.0]), min_size=8, max_size=8),
    min_size=1,
    max_size=3,
).map(lambda values: torch.tensor(values, dtype=torch.float64))
shares = st.floats(0.01, 1.0)


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(scores=rows, k=st.integers(1, 12))
def test_top_k_keeps_exactly_k_of_the_highest_as_they_are(scores: Tensor, k: int) -> None:
    found = keep_top_k(scores, k)
    kept = found.isfinite()
    assert (kept.sum(-1) == min(k, 8)).all()
    assert torch.equal(found[kept], scores[kept])
    for row, mask in zip(scores, kept, strict=True):
        assert mask.all() or row[mask].min() >= row[~mask].max()


@given(scores=rows, p=shares)
def test_top_p_keeps_the_smallest_set_with_enough_mass(scores: Tensor, p: float) -> None:
    found = keep_top_p(scores, p)
    kept = found.isfinite()
    assert torch.equal(found[kept], scores[kept])
    for row, mask in zip(scores, kept, strict=True):
        mass = row.softmax(-1)[mask]
        assert mask.all() or row[mask].min() >= row[~mask].max()
        assert mass.sum() >= p - 1e-12
        # The lightest one was needed. (The last digits depend on the order of the sum.)
        assert len(mass) == 1 or p == 1 or mass.sum() - mass.min() < p + 1e-12


def test_top_p_is_content_with_exactly_p() -> None:
    four = torch.zeros(1, 4)
    for p, kept in ((0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)):
        assert keep_top_p(four, p).isfinite().tolist() == [[True] * kept + [False] * (4 - kept)]


@given(scores=rows)
def test_top_p_of_everything_keeps_everything(scores: Tensor) -> None:
    assert torch.equal(keep_top_p(scores, 1.0), scores)


@given(scores=rows, k=st.integers(1, 8))
def test_top_k_of_what_it_left_is_the_same(scores: Tensor, k: int) -> None:
    once = keep_top_k(scores, k)
    assert torch.equal(keep_top_k(once, k), once)


@given(scores=rows, p=shares, k=st.integers(1, 8), seed=st.integers(0, 100))
def test_temperature_zero_takes_the_likeliest_whatever_else_is_set(
    scores: Tensor, p: float, k: int, seed: int
) -> None:
    token = choose(scores, Choice(temperature=0, top_k=k, top_p=p), source(seed))
    assert torch.equal(token, scores.argmax(-1))


@given(
    scores=rows,
    temperature=st.sampled_from([0.0, 1e-300, 1e-6, 0.3, 1.0, 7.0, 1e30]),
    k=st.none() | st.integers(1, 12),
    p=st.none() | shares,
    seed=st.integers(0, 20),
)
def test_a_choice_is_always_among_what_the_filters_leave(
    scores: Tensor, temperature: float, k: int | None, p: float | None, seed: int
) -> None:
    token = choose(scores, Choice(temperature=temperature, top_k=k, top_p=p), source(seed))
    assert token.shape == (len(scores),)
    if k is not None:
        allowed = scores.gather(1, token[:, None]) >= scores.topk(min(k, 8)).values[:, -1:]
        assert allowed.all()


def test_tokens_come_as_often_as_the_temperature_says() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0])
    for temperature in (0.5, 1.0, 2.0):
        drawn = choose(scores.expand(20_000, 3), Choice(temperature=temperature), source())
        shares = torch.bincount(drawn, minlength=3) / 20_000
        expected = torch.softmax(scores / temperature, 0)
        # Five standard errors.
        assert (shares - expected).abs().max() < 5 * math.sqrt(0.25 / 20_000)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_invalid_scores_of_the_model_are_an_error_that_names_them(broken: float) -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(NotFiniteError, match="not finite"):
            choose(torch.tensor([[0.0, broken]]), Choice(temperature=temperature), source())


class Summing(nn.Module):
    """Scores from a sum over all that it sees and where it sees it: exact in float64."""

    def __init__(self, context_length: int) -> None:
        super().__init__()
        self.context_length = context_length
        self.longest = 0
        self.forwards = 0

    def sums(self, tokens: Tensor, start: int) -> Tensor:
        self.longest = max(self.longest, start + tokens.shape[1])
        self.forwards += tokens.shape[1]
        if self.longest > self.context_length:
            raise ValueError("more tokens than the context holds")
        places = torch.arange(start + 1, start + 1 + tokens.shape[1])
        return ((tokens + 1) * places).cumsum(1)

    def scores(self, sums: Tensor) -> Tensor:
        return ((sums[..., None] * torch.arange(1, 12)) % 13).double()

    def logits(self, tokens: Tensor) -> Tensor:
        return self.scores(self.sums(tokens, 0))


class Cached(Summing):
    """The same, with a cache: the sum so far and the number of tokens in it."""

    def make_cache(self, batch_size: int, length: int) -> list[Tensor]:
        self.caches = getattr(self, "caches", 0) + 1
        assert length <= self.context_length
        return [torch.zeros(batch_size, 1, dtype=torch.int64), torch.zeros((), dtype=torch.int64)]

    def logits(self, tokens: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        if cache is None:
            return super().logits(tokens)
        sums = cache[0] + self.sums(tokens, int(cache[1]))
        cache[:] = [sums[:, -1:], cache[1] + tokens.shape[1]]
        return self.scores(sums)


def written(model: nn.Module, prompt: Tensor, count: int, choice: Choice) -> Tensor:
    columns = list(generate(model, prompt, count, choice, source(5)))
    return torch.stack(columns, 1)


@given(
    context_length=st.integers(1, 12),
    length=st.integers(1, 15),
    count=st.integers(0, 40),
    temperature=st.sampled_from([0.0, 1.0]),
)
@settings(deadline=None)
def test_a_cache_changes_nothing_also_when_the_text_outgrows_the_context(
    context_length: int, length: int, count: int, temperature: float
) -> None:
    prompt = torch.arange(2 * length).view(2, length) % 11
    choice = Choice(temperature=temperature)
    plain, cached = Summing(context_length), Cached(context_length)
    if count == 0:
        assert list(generate(cached, prompt, 0, choice, source())) == []
        return
    assert torch.equal(
        written(plain, prompt, count, choice), written(cached, prompt, count, choice)
    )
    assert plain.longest == cached.longest == min(context_length, length + count - 1)


def test_a_full_context_is_rebuilt_once_in_a_quarter_of_it() -> None:
    model = Cached(64)
    written(model, torch.zeros(1, 1, dtype=torch.int64), 64 + 16 * 10, Choice(temperature=0))
    # The first cache holds tokens 1 to 64, each further one 16 tokens more.
    assert model.caches == 1 + 10
    assert model.forwards == 64 + 10 * 64


def test_the_model_sees_the_end_of_a_long_prompt() -> None:
    prompt = torch.arange(30)[None] % 11
    choice = Choice(temperature=0)
    assert torch.equal(
        written(Summing(8), prompt, 1, choice), written(Summing(8), prompt[:, -8:], 1, choice)
    )


def test_generating_leaves_no_graph_and_no_trace_in_the_global_generator() -> None:
    class Watched(Summing):
        def logits(self, tokens: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return super().logits(tokens)

    before = torch.get_rng_state()
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    for _ in generate(Watched(8), prompt, 3, Choice(), source()):
        # The consumer of the tokens is outside of the no_grad.
        assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_error_for_a_model_that_cannot_be_sampled_names_what_it_lacks() -> None:
    check_model(Summing(3))
    with pytest.raises(
        SettingsError,
        match=r"Linear, which lacks a method logits\(tokens\) and an attribute context_length",
    ):
        check_model(nn.Linear(1, 1))
