"""The plugin: settings, presets, and real runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fundamentallm import (
    Batch,
    Data,
    Progress,
    Run,
    SettingsError,
    compose,
    field,
    hookimpl,
    plugin,
)
from fundamentallm.testing import (
    PluginContract,
    TinyOptimizer,
    TinyRun,
    assert_same_weights,
    weights,
)
from fundamentallm_gpt import Gpt
from fundamentallm_gpt.model import GPT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

VOCAB = 7


@plugin
class CountingData:
    """Windows of a text that counts up to 6 again and again; validation has padded targets."""

    context_length: int = field(default=8)
    """Tokens in a window."""

    @hookimpl
    def build_data(self, run: Run) -> Data:
        return Counting(self.context_length)


class Counting:
    epoch_samples = None
    fingerprint = "counting"
    vocab_size = VOCAB

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length

    def batches(self, progress: Progress) -> Iterator[Batch]:
        first = progress.samples
        while True:
            yield self.batch(first)
            first += 4

    def batch(self, first: int, padding: int = 0) -> Batch:
        starts = torch.arange(first, first + 4)[:, None]
        window = (starts + torch.arange(self.context_length + 1)) % VOCAB
        inputs, targets = window[:, :-1], window[:, 1:].clone()
        targets[:, self.context_length - padding :] = -100
        counted = 4 * (self.context_length - padding)
        return Batch((inputs, targets), counted, 4, counted, first=first)

    def validation(self) -> Mapping[str, list[Batch]]:
        return {"val": [self.batch(0), self.batch(2, padding=3)]}


SMALL: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "d_model": 16}


class TestContract(PluginContract):
    plugin = Gpt
    needs = SMALL
    companions = (CountingData,)


def problems(**table: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        compose({"plugins": ["gpt"], "gpt": table}, plugins=[CountingData()])
    return [text for text in caught.value.problems if "gpt" in text]


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 1},
        {"dropout": 0.1, "bias": True, "tie_embeddings": False, "qk_norm": True},
    ],
)
def test_a_run_learns_to_count(tiny_run: TinyRun, chosen: dict[str, Any]) -> None:
    run = tiny_run(Gpt(**SMALL, **chosen), CountingData(), length=40, seed=3)
    assert run.history[-1]["val/loss"] < 0.1
    assert run.history[0]["train/loss"] > 1.0


def test_a_run_with_the_loss_in_chunks_trains_the_same_weights(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    whole, parted = (
        tiny_run(Gpt(**SMALL, loss_chunks=n), CountingData(), run_dir=tmp_path / str(n))
        for n in (1, 3)
    )
    assert isinstance(parted.model, GPT)
    assert parted.model.loss_chunks == 3
    for mine, theirs in zip(weights(parted).values(), weights(whole).values(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_seed_decides_the_initial_weights(tiny_run: TinyRun) -> None:
    runs = [
        tiny_run(Gpt(**SMALL, dropout=0.1), CountingData(), length=2, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert_same_weights(runs[0], runs[1])
    with pytest.raises(AssertionError, match="these weights differ"):
        assert_same_weights(runs[0], runs[2])


def test_vocabulary_and_context_come_from_the_data(tiny_run: TinyRun) -> None:
    model = tiny_run(Gpt(**SMALL), CountingData(context_length=5), length=1).model
    assert isinstance(model, GPT)
    assert (model.vocab_size, model.context_length) == (VOCAB, 5)


def test_the_context_may_be_longer_than_the_data_but_not_shorter(tiny_run: TinyRun) -> None:
    run = tiny_run(Gpt(**SMALL, context_length=12), CountingData(), length=1)
    assert run.model.state_dict()["positions.weight"].shape == (12, 16)
    with pytest.raises(SettingsError, match=r"gpt.context_length: 7 is shorter .* 8 tokens"):
        tiny_run(Gpt(**SMALL, context_length=7), CountingData(), length=1)


def test_data_that_does_not_consist_of_tokens_is_refused_by_name(tiny_run: TinyRun) -> None:
    with pytest.raises(SettingsError, match=r"TinySamples\) has no vocab_size"):
        tiny_run(Gpt(**SMALL), length=1)


def test_a_setting_replaces_its_part_of_the_preset_and_nothing_else() -> None:
    preset = Gpt(preset="llama-3-8b").shape()
    changed = Gpt(preset="llama-3-8b", num_layers=2, rope_theta=1e6).shape()
    assert (preset.num_layers, preset.num_kv_heads, preset.rope_theta) == (32, 8, 500_000)
    assert (changed.num_layers, changed.rope_theta) == (2, 1e6)
    same = vars(changed) | {"num_layers": 32, "rope_theta": 500_000}
    assert same == vars(preset)


def test_derived_sizes_follow_the_chosen_ones() -> None:
    assert Gpt(d_model=256).shape().d_ff == 1024
    assert Gpt(preset="gpt2", d_model=96).shape().d_ff == 384
    assert Gpt(num_heads=8).shape().num_kv_heads == 8
    # 8/3 of the width, rounded up to 64: the three matrices cost about what two of 4x do.
    assert Gpt(d_model=768, activation="swiglu").shape().d_ff == 2048
    assert Gpt(d_model=128, activation="swiglu").shape().d_ff == 384


def test_sizes_that_do_not_fit_are_start_up_errors() -> None:
    assert problems(d_model=100, num_heads=3) == [
        "settings: gpt.d_model: 100 is not a multiple of num_heads, 3"
    ]
    assert problems(num_heads=8, num_kv_heads=3) == [
        "settings: gpt.num_kv_heads: 3 does not divide num_heads, 8"
    ]
    (odd,) = problems(d_model=12, num_heads=4, positions="rope")
    assert "gpt.d_model: rope rotates pairs, and d_model / num_heads is 3" in odd


def test_a_setting_without_effect_is_an_error() -> None:
    (problem,) = problems(rope_theta=500.0)
    assert "gpt.rope_theta: has no effect with positions = 'learned'" in problem
    compose(
        {"plugins": ["gpt"], "gpt": {"rope_theta": 500.0, "preset": "llama-2-7b"}}
        | {"run": {"length": 1}},
        plugins=[CountingData(), TinyOptimizer()],
    )


def test_mistakes_are_reported_together_and_with_a_suggestion() -> None:
    found = "\n".join(problems(preset="gpt-2", num_layers=0, dropout=1.0, d_modle=8, norm="rms"))
    assert "did you mean 'gpt2'" in found
    assert "did you mean 'd_model'" in found
    assert "did you mean 'rmsnorm'" in found
    assert "gpt.num_layers" in found
    assert "gpt.dropout" in found


def test_every_choice_is_checked_when_the_plugin_is_built_in_python() -> None:
    for wrong in (
        {"preset": "gpt-2"},
        {"positions": "ropes"},
        {"norm": "rms"},
        {"activation": "x"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Gpt(**wrong)  # type: ignore[arg-type]
