"""Accumulated micro-batches give the gradients of one big batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fundamentallm import Batch, Progress, Run, hookimpl, plugin, train
from fundamentallm.testing import PluginContract, TinyRun, compose_tiny
from fundamentallm_accumulate import Accumulate

VOCABULARY, WIDTH, TOKENS, PADDING = 11, 5, 7, -100


class TestContract(PluginContract):
    plugin = Accumulate
    needs = {"microbatches": 2}
    wrong_settings = (
        ({}, "accumulate.microbatches: is missing, and has no default"),
        ({"microbatches": 0}, "accumulate.microbatches: must be >= 1"),
        ({"microbatches": 2.0}, "accumulate.microbatches: expected a whole number"),
    )


class Padded:
    """Sentences of ``lengths[i]`` target tokens, the rest padding, in micro-batches of ``sizes``."""

    epoch_samples = None
    fingerprint = "padded"

    def __init__(self, lengths: list[int], sizes: list[int]) -> None:
        self.lengths, self.sizes = lengths, sizes

    def batches(self, _: Progress) -> Iterator[Batch]:
        while True:
            first = 0
            for size in self.sizes:
                yield self.batch(first, size)
                first += size

    def batch(self, first: int, size: int) -> Batch:
        generator = torch.Generator().manual_seed(1)
        shape = (len(self.lengths), TOKENS)
        tokens = torch.randint(VOCABULARY, shape, generator=generator)
        targets = torch.randint(VOCABULARY, shape, generator=generator)
        for row, length in enumerate(self.lengths):
            targets[row, length:] = PADDING
        rows = slice(first, first + size)
        weight = sum(self.lengths[rows])
        return Batch((tokens[rows], targets[rows]), weight, size, weight, first=first)

    def validation(self) -> dict[str, list[Batch]]:
        return {}


class Bigram(nn.Module):
    """Predicts the next token from the current one; the loss is a mean over unpadded targets."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, VOCABULARY))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.embedding(tokens))
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING
        )


def trained(lengths: list[int], sizes: list[int], folder: Path, steps: int = 1) -> Run:
    """Train a few steps, each on all the sentences in micro-batches of the given sizes."""

    @plugin
    class Sentences:
        """A model in double precision and its data."""

        @hookimpl
        def build_data(self) -> Padded:
            return Padded(lengths, sizes)

        @hookimpl
        def build_model(self) -> nn.Module:
            return Bigram().double()

    accumulate = Accumulate(microbatches=len(sizes))
    composed = compose_tiny(Sentences(), accumulate, length=steps, log_every=1)
    return train(composed, run_dir=folder)


def difference(one: Run, other: Run) -> float:
    """Return the largest relative difference of the gradients, parameter by parameter."""
    pairs = [
        (p.grad, q.grad)
        for p, q in zip(one.parameters, other.parameters, strict=True)
        if p.grad is not None and q.grad is not None
    ]
    assert len(pairs) == len(one.parameters)
    return max(float((p - q).norm() / q.norm()) for p, q in pairs)


def test_uneven_padded_microbatches_have_the_gradient_of_one_big_batch(tmp_path: Path) -> None:
    lengths = [7, 1, 7, 2, 3, 7, 1, 1, 5, 6]
    window = trained(lengths, [4, 4, 2], tmp_path / "window")
    whole = trained(lengths, [10], tmp_path / "whole")
    assert difference(window, whole) < 1e-12
    assert window.history[0]["train/loss"] == pytest.approx(
        whole.history[0]["train/loss"], rel=1e-12
    )


def test_accumulated_and_whole_batches_train_the_same_weights(tmp_path: Path) -> None:
    lengths = [7, 1, 7, 2, 3, 7]
    window = trained(lengths, [1, 4, 1], tmp_path / "window", steps=5)
    whole = trained(lengths, [6], tmp_path / "whole", steps=5)
    for one, other in zip(window.parameters, whole.parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    total = sum(sizes)
    lengths = draw(st.lists(st.integers(0, TOKENS), min_size=total, max_size=total))
    lengths[draw(st.integers(0, total - 1))] = draw(st.integers(1, TOKENS))
    return lengths, sizes


@settings(max_examples=15, deadline=None)
@given(windows())
def test_any_split_into_padded_microbatches_has_the_gradient_of_the_whole_batch(
    tmp_path_factory: pytest.TempPathFactory, window: tuple[list[int], list[int]]
) -> None:
    lengths, sizes = window
    folder = tmp_path_factory.mktemp("runs")
    split = trained(lengths, sizes, folder / "split")
    whole = trained(lengths, [sum(sizes)], folder / "whole")
    assert difference(split, whole) < 1e-6


def test_a_window_is_one_step_and_the_next_window_continues_the_data(tiny_run: TinyRun) -> None:
    firsts: list[list[int]] = []

    @plugin
    class Watch:
        """Records the index of the first sample of every micro-batch."""

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            firsts.append([batch.first for batch in run.window])

    run = tiny_run(Accumulate(microbatches=3), Watch(), length=2)
    assert firsts == [[0, 4, 8], [12, 16, 20]]
    assert (run.progress.step, run.progress.microbatches, run.progress.samples) == (2, 6, 24)
