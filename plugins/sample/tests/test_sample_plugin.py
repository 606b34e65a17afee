"""The plugin writes samples in real runs, and does not change the training."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fundamentallm import Batch, Data, Period, Progress, Run, SettingsError, hookimpl, plugin
from fundamentallm.testing import PluginContract, Recorder, TinyRun, assert_same_weights
from fundamentallm_sample import Sample

LETTERS = "\nabcdefg"


class Letters:
    """A tokenizer of a few letters."""

    vocab_size = len(LETTERS)

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(LETTERS[token] for token in tokens)


class Alphabet:
    """Windows of the alphabet, again and again."""

    epoch_samples = None
    fingerprint = "alphabet"
    vocab_size = len(LETTERS)
    context_length = 6

    def __init__(self, tokenizer: Letters | None) -> None:
        self.tokenizer = tokenizer

    def batches(self, progress: Progress) -> Iterator[Batch]:
        first = progress.samples
        while True:
            window = (torch.arange(first, first + 4)[:, None] + torch.arange(7)) % len(LETTERS)
            yield Batch((window[:, :-1], window[:, 1:]), 24, 4, 24, first=first)
            first += 4

    def validation(self) -> Mapping[str, list[Batch]]:
        return {"val": [next(self.batches(Progress()))]}


class NextLetter(nn.Module):
    """Scores from the last letter alone, with dropout, and without a cache."""

    context_length = 6

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(len(LETTERS), len(LETTERS))
        self.dropout = nn.Dropout(0.2)
        self.frozen = nn.BatchNorm1d(1)
        self.modes: list[bool] = []

    def logits(self, tokens: Tensor) -> Tensor:
        self.modes.append(self.training)
        scores: Tensor = self.dropout(self.table(tokens))
        return scores

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        scores = self.dropout(self.table(inputs))
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten())


@plugin
class TinyLanguage:
    """Letters, and a model of which letter follows which."""

    has_tokenizer: bool = True
    """Whether the data brings its tokenizer."""

    @hookimpl
    def build_data(self) -> Data:
        return Alphabet(Letters() if self.has_tokenizer else None)

    @hookimpl
    def build_model(self) -> nn.Module:
        return NextLetter()


class TestContract(PluginContract):
    plugin = Sample
    companions = (TinyLanguage,)


def sampled(run: Run, folder: str = "samples") -> dict[str, str]:
    return {
        path.name: path.read_text(encoding="utf-8")
        for path in sorted((run.folder / folder).glob("*.txt"))
    }


def test_sampling_reports_its_progress(tiny_run: TinyRun) -> None:
    trace = Recorder()
    how = Sample(every=Period(2), prompt="ab", max_tokens=3, num_samples=2)
    tiny_run(how, TinyLanguage(), length=2, trace=trace)
    reports = [given for _, given in trace.calls if given.get("task") == "sampling"]
    assert [(given["done"], given["total"]) for given in reports] == [(1, 3), (2, 3), (3, 3)]


def test_writes_a_file_every_period_and_one_at_the_end(tiny_run: TinyRun) -> None:
    run = tiny_run(
        Sample(every=Period(3), prompt="ab", max_tokens=5, num_samples=2), TinyLanguage(), length=7
    )
    texts = sampled(run)
    assert list(texts) == ["step-00000003.txt", "step-00000006.txt", "step-00000007.txt"]
    for text in texts.values():
        one, other = text.removesuffix("\n").split("\n---------------\n")
        assert len(one) == len(other) == 7
        assert one.startswith("ab")
        assert other.startswith("ab")


def test_a_trained_model_writes_what_it_learned(tiny_run: TinyRun) -> None:
    how = Sample(prompt="a", max_tokens=9, temperature=0)
    run = tiny_run(how, TinyLanguage(), length=300)
    assert sampled(run)["step-00000300.txt"] == "abcdefg\nab\n"


def test_the_log_shows_the_samples(tiny_run: TinyRun, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fundamentallm")
    run = tiny_run(Sample(prompt="g", max_tokens=4), TinyLanguage(), length=2)
    assert f"sample at step 2:\n{sampled(run)['step-00000002.txt'][:-1]}" in caplog.messages


def test_training_is_bit_identical_with_and_without_samples(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    with_samples = tiny_run(
        Sample(every=Period(1)), TinyLanguage(), length=9, log_every=1, run_dir=tmp_path / "with"
    )
    without = tiny_run(TinyLanguage(), length=9, log_every=1, run_dir=tmp_path / "without")
    assert len(sampled(with_samples)) == 9
    assert_same_weights(with_samples, without)
    assert with_samples.history == without.history


@plugin
class Freeze:
    """Keep one part of the model in evaluation mode."""

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        run.model.get_submodule("frozen").eval()


def test_the_model_is_sampled_in_evaluation_mode_and_its_modes_are_restored(
    tiny_run: TinyRun,
) -> None:
    model = tiny_run(Sample(max_tokens=3), TinyLanguage(), Freeze(), length=1).model
    assert isinstance(model, NextLetter)
    assert model.modes == [False] * 3
    modes = {name: module.training for name, module in model.named_modules()}
    assert modes == {"": True, "table": True, "dropout": True, "frozen": False}


def test_the_same_run_writes_the_same_samples_and_every_step_different_ones(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    how = {"every": Period(1), "max_tokens": 40, "temperature": 5.0}
    runs = [
        tiny_run(Sample(**how), TinyLanguage(), length=3, seed=seed, run_dir=tmp_path / str(i))  # type: ignore[arg-type]
        for i, seed in enumerate((1, 1, 2))
    ]
    assert sampled(runs[0]) == sampled(runs[1])
    assert sampled(runs[0]) != sampled(runs[2])
    assert len(set(sampled(runs[0]).values())) == 3


@plugin
class OnlyC:
    """Evaluates with weights that make c the next letter."""

    inside: int = 0

    @hookimpl
    @contextmanager
    def evaluation_weights(self, run: Run) -> Iterator[None]:
        table = run.model.table.weight.data
        kept = table.clone()
        table.copy_(torch.eye(len(LETTERS))[LETTERS.index("c")])
        self.inside += 1
        yield
        self.inside -= 1
        table.copy_(kept)


def test_samples_use_the_weights_of_validation_and_training_its_own(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    how, only_c = Sample(every=Period(2), prompt="a", max_tokens=3, temperature=0), OnlyC()
    run = tiny_run(how, only_c, TinyLanguage(), length=4, run_dir=tmp_path / "with")
    assert sampled(run) == {f"step-0000000{step}.txt": "accc\n" for step in (2, 4)}
    assert only_c.inside == 0
    assert_same_weights(run, tiny_run(TinyLanguage(), length=4, run_dir=tmp_path / "without"))


def test_a_second_instance_has_its_own_folder(tiny_run: TinyRun) -> None:
    run = tiny_run(
        "sample",
        "greedy",
        TinyLanguage(),
        settings={"greedy": {"plugin": "sample", "temperature": 0, "prompt": "b"}},
        length=1,
    )
    assert sampled(run)["step-00000001.txt"].startswith("\n")
    assert sampled(run, "samples/greedy")["step-00000001.txt"].startswith("b")


def test_a_run_without_a_tokenizer_does_not_start(tiny_run: TinyRun) -> None:
    with pytest.raises(SettingsError, match=r"needs a tokenizer, but the data \(Alphabet\)"):
        tiny_run(Sample(), TinyLanguage(has_tokenizer=False))


@plugin
class NoLogits:
    """Letters, and a model that has a loss and nothing else."""

    @hookimpl
    def build_data(self) -> Data:
        return Alphabet(Letters())

    @hookimpl
    def build_model(self) -> nn.Module:
        return nn.Linear(1, 1)


def test_a_run_with_a_model_that_cannot_be_sampled_from_does_not_start(tiny_run: TinyRun) -> None:
    with pytest.raises(SettingsError, match=r"Linear, which lacks a method logits"):
        tiny_run(Sample(), NoLogits())


def test_an_empty_prompt_is_an_error(tiny_run: TinyRun) -> None:
    with pytest.raises(SettingsError, match=r"sample.prompt: is empty"):
        tiny_run("sample", TinyLanguage(), settings={"sample": {"prompt": ""}})


def test_a_folder_that_cannot_be_written_ends_the_samples_and_not_the_run(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("in the way")
    run = tiny_run(Sample(every=Period(1)), TinyLanguage(), length=3)
    assert run.outcome == "finished"
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert "samples/step-00000001.txt: cannot be written" in warning


@plugin
class Interrupt:
    """Sends SIGINT in step 2."""

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if run.progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_nothing_is_sampled_after_a_signal(tiny_run: TinyRun) -> None:
    run = tiny_run(Sample(every=Period(1)), TinyLanguage(), Interrupt(), length=5)
    assert run.outcome == "interrupted"
    assert list(sampled(run)) == ["step-00000001.txt"]
