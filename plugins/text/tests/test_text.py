"""The plugin in real runs: its batches are the same for every way of reading them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fundamentallm import Batch, PluginError, Progress, Run, SettingsError, hookimpl, plugin
from fundamentallm.testing import PluginContract, TinyRun, assert_same_weights
from fundamentallm_text import Text
from fundamentallm_text.corpus import Corpus

VERSE = "The quick brown fox jumps over the lazy dog.\n" * 40


@plugin
class Bigram:
    """Predicts each token from the one before."""

    @hookimpl
    def build_model(self, run: Run) -> nn.Module:
        class Table(nn.Module):
            def __init__(self, vocab_size: int) -> None:
                super().__init__()
                self.scores = nn.Embedding(vocab_size, vocab_size)

            def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                scores = self.scores(inputs).flatten(0, 1)
                return nn.functional.cross_entropy(scores, targets.flatten())

        return Table(run.data.vocab_size)  # type: ignore[attr-defined]


class TestContract(PluginContract):
    plugin = Text
    needs: ClassVar[dict[str, Any]] = {"path": Path(__file__), "context_length": 8}
    companions = (Bigram,)


TextRun = Callable[..., Run]
Read = Callable[..., Corpus]


@pytest.fixture
def text_run(tiny_run: TinyRun, tmp_path: Path) -> TextRun:
    """Train a bigram model for a step (or ``length``) on what the settings say."""

    def start(*in_thread: object, length: Any = 1, **text: Any) -> Run:
        folder = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        return tiny_run(_text(tmp_path, text), Bigram(), *in_thread, run_dir=folder, length=length)

    return start


@pytest.fixture
def corpus(text_run: TextRun, tmp_path: Path) -> Read:
    """Build the data of a run as the settings say."""
    run = text_run()
    run.folder = tmp_path / "new"  # one that keeps no tokenizer yet

    def read(**text: Any) -> Corpus:
        data = _text(tmp_path, text).build_data(run)
        assert isinstance(data, Corpus)
        return data

    return read


def _text(folder: Path, settings: dict[str, Any]) -> Text:
    path = _written(folder, VERSE, "verse.txt")
    usual: dict[str, Any] = {"path": path, "context_length": 8, "batch_size": 4}
    return Text(**usual | settings)


def _written(folder: Path, content: str, name: str = "corpus.txt") -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def _samples(data: Corpus, first: int, count: int) -> list[list[int]]:
    """Return ``count`` samples of the stream from ``first`` on, in batches of any size."""
    found: list[list[int]] = []
    for batch in data.batches(Progress(samples=first)):
        found += _rows(batch)
        if len(found) >= count:
            data.close()
            return found[:count]
    return found


def _rows(batch: Batch) -> list[list[int]]:
    inputs, targets = batch.data
    assert inputs[:, 1:].equal(targets[:, :-1])
    return torch.cat([inputs, targets[:, -1:]], dim=1).tolist()


def _text_of(data: Corpus, tokens: Any) -> str:
    assert data.tokenizer is not None
    return data.tokenizer.decode([int(token) for token in tokens])


@pytest.mark.parametrize("sampling", ["random", "epochs"])
@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_a_model_learns_from_text(text_run: TextRun, tokenizer: Any, sampling: Any) -> None:
    run = text_run(length=60, tokenizer=tokenizer, sampling=sampling)
    assert run.history[-1]["train/loss"] < run.history[0]["train/loss"]
    assert run.history[-1]["val/loss"] < run.history[0]["train/loss"]
    assert run.progress.samples == 240
    assert run.progress.tokens == 240 * 8
    assert run.tokenizer is run.data.tokenizer  # type: ignore[attr-defined]


def test_a_table_in_the_settings_is_enough(tiny_run: TinyRun, tmp_path: Path) -> None:
    _written(tmp_path, VERSE, "a.txt")
    (tmp_path / "run.toml").write_text('plugins = ["text"]\n')
    table = {"path": str(tmp_path / "*.txt"), "context_length": 4, "tokenizer": "byte"}
    run = tiny_run("text", Bigram(), settings={"text": table})
    assert run.outcome == "finished"


def test_windows_are_consecutive_tokens_of_the_text(corpus: Read) -> None:
    data = corpus()
    text = VERSE[: int(len(VERSE) * 0.9)]
    for row in _samples(data, 0, 50):
        assert len(row) == 9
        assert _text_of(data, row) in text


def test_the_end_of_the_text_is_held_out(corpus: Read) -> None:
    data = corpus(validation_fraction=0.25)
    middle = int(len(VERSE) * 0.75)
    assert _text_of(data, data.train.tokens) == VERSE[:middle]
    assert _text_of(data, data.held_out["val"].tokens) == VERSE[middle:]


def test_other_files_can_be_held_out(corpus: Read, tmp_path: Path) -> None:
    data = corpus(validation_path=_written(tmp_path, "Ünlike the other.", "held.txt"))
    assert _text_of(data, data.train.tokens) == VERSE
    assert _text_of(data, data.held_out["val"].tokens) == "Ünlike the other."
    assert data.bytes_per_token("val") == 18 / 17


def test_a_validation_fraction_of_zero_holds_nothing_out(corpus: Read) -> None:
    data = corpus(validation_fraction=0.0)
    assert data.validation() == {}
    assert data.bytes_per_token("val") is None
    assert len(data.train.tokens) == len(VERSE)


def test_validation_is_the_whole_split_once_and_the_same_every_time(corpus: Read) -> None:
    data = corpus()
    passes = [[_rows(batch) for batch in data.validation()["val"]] for _ in range(2)]
    assert passes[0] == passes[1]
    held_out = data.held_out["val"].tokens.tolist()
    targets = [token for rows in passes[0] for row in rows for token in row[1:]]
    assert targets == held_out[1 : len(targets) + 1]
    assert len(held_out) - 1 - len(targets) < 8
    batches = list(data.validation()["val"])
    assert len(batches) == len(data.validation()["val"])
    assert [batch.weight for batch in batches] == [8.0 * len(batch.data[0]) for batch in batches]


def test_a_validation_can_be_a_few_batches_spread_over_the_split(corpus: Read) -> None:
    data = corpus(validation_batches=2, batch_size=2)
    whole = corpus(batch_size=1)
    rows = [row for batch in data.validation()["val"] for row in _rows(batch)]
    all_rows = [row for batch in whole.validation()["val"] for row in _rows(batch)]
    assert rows == [all_rows[i * len(all_rows) // 4] for i in range(4)]


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(0, 500), size=st.integers(1, 9), depth=st.integers(0, 2))
@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_samples_are_the_same_from_any_start_in_any_batch_size(
    corpus_of: dict[str, Corpus], sampling: str, first: int, size: int, depth: int
) -> None:
    data = corpus_of[sampling]
    whole = _samples(data, 0, 550)
    text = data.settings
    before = text.batch_size, text.prefetch
    text.batch_size, text.prefetch = size, depth
    try:
        assert _samples(data, first, 50) == whole[first : first + 50]
    finally:
        text.batch_size, text.prefetch = before


@pytest.fixture
def corpus_of(corpus: Read) -> dict[str, Corpus]:
    return {sampling: corpus(sampling=sampling) for sampling in ("random", "epochs")}


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_every_micro_batch(corpus: Read, processes: int) -> None:
    data = corpus(batch_size=7, sampling="epochs")
    whole = list(islice(data.batches(Progress(samples=5)), 20))
    whole_validation = list(data.validation()["val"])
    data.run.data_size = processes
    parts, validations = [], []
    for rank in range(processes):
        data.run.data_rank = rank
        parts.append(list(islice(data.batches(Progress(samples=5)), 20)))
        validations.append(list(data.validation()["val"]))
        assert len(data.validation()["val"]) == len(validations[-1])
    for batch, *shares in zip(whole, *parts, strict=True):
        assert [row for share in shares for row in _rows(share)] == _rows(batch)
        assert shares[0].first == batch.first
        assert {(share.samples, share.tokens) for share in shares} == {(7, 56)}
        assert sum(share.weight for share in shares) == batch.weight
        assert {share.total for share in shares} == {batch.weight}
    # All yield equally many micro-batches; where one has no sample, it has one without weight.
    assert {len(batches) for batches in validations} == {len(whole_validation)}
    weighed = [batch for batches in validations for batch in batches if batch.weight]
    rows = sorted(row for batch in weighed for row in _rows(batch))
    assert rows == sorted(row for batch in whole_validation for row in _rows(batch))


def test_more_processes_than_windows_is_an_error(corpus: Read) -> None:
    data = corpus(batch_size=2)
    data.run.data_size = 3
    with pytest.raises(SettingsError, match="2 windows are too few for 3 processes"):
        data.batches(Progress())


def test_an_epoch_is_its_windows_and_periods_in_epochs_count_them(text_run: TextRun) -> None:
    run = text_run(length="2 epochs", sampling="epochs", batch_size=5)
    windows = (int(len(VERSE) * 0.9) - 1) // 8
    assert run.data.epoch_samples == windows
    assert run.progress.step == -(-2 * windows // 5)


@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_one_window_is_enough(text_run: TextRun, tmp_path: Path, sampling: Any) -> None:
    path = _written(tmp_path, "123456789")
    run = text_run(length=3, path=path, validation_fraction=0.0, sampling=sampling)
    assert run.progress.samples == 12


def test_random_windows_have_no_epochs(text_run: TextRun) -> None:
    with pytest.raises(SettingsError, match="epoch"):
        text_run(length="2 epochs", sampling="random")


def test_prefetching_changes_no_batch_and_leaves_no_thread(text_run: TextRun) -> None:
    before = threading.active_count()
    runs = [text_run(length=30, prefetch=depth) for depth in (0, 1, 5)]
    assert threading.active_count() == before
    for run in runs[1:]:
        assert_same_weights(runs[0], run)


@plugin
class Fails:
    """Fails in the middle of a run."""

    @hookimpl
    def on_step_end(self) -> None:
        raise RuntimeError("something")


def test_a_run_that_fails_leaves_no_thread(text_run: TextRun) -> None:
    before = threading.active_count()
    with pytest.raises(PluginError) as caught:
        text_run(Fails(), prefetch=2)
    # The traceback still holds the frames that hold the stream.
    assert threading.active_count() == before
    del caught


def test_batches_do_not_change_the_global_random_states(corpus: Read) -> None:
    data = corpus(prefetch=2)
    before = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    list(islice(data.batches(Progress()), 10))
    list(data.validation()["val"])
    assert before[0].equal(torch.get_rng_state())
    assert before[1] == str(np.random.get_state())  # noqa: NPY002


def test_the_fingerprint_changes_exactly_with_the_samples_and_their_order(
    corpus: Read, tmp_path: Path
) -> None:
    same: list[dict[str, Any]] = [
        {},
        {"batch_size": 3},
        {"prefetch": 1},
        {"cache_dir": tmp_path / "elsewhere"},
        {"path": _written(tmp_path, VERSE, "copy.txt")},
        {"validation_batches": 1},
    ]
    other: list[dict[str, Any]] = [
        {"context_length": 9},
        {"sampling": "epochs"},
        {"tokenizer": "byte"},
        {"validation_fraction": 0.2},
        {"path": _written(tmp_path, VERSE.replace("lazy", "cozy"), "other.txt")},
        {"path": _written(tmp_path, VERSE.replace("z", "ß"), "shape.txt")},
        {"separator": "!"},
        {"max_bytes": 500},
    ]
    assert len({corpus(**text).fingerprint for text in same}) == 1
    assert len({corpus(**text).fingerprint for text in [{}, *other]}) == 1 + len(other)
    data = corpus()
    data.run.settings.seed += 1
    assert corpus().fingerprint != data.fingerprint


def test_max_bytes_reads_only_the_beginning(corpus: Read, tmp_path: Path) -> None:
    path = _written(tmp_path, "äöü" * 100)
    data = corpus(path=path, max_bytes=101, validation_fraction=0.0)
    assert _text_of(data, data.train.tokens) == ("äöü" * 100)[:50]


def test_max_bytes_above_the_file_size_reads_everything(corpus: Read) -> None:
    assert corpus(max_bytes=10**20).fingerprint == corpus().fingerprint


def test_files_are_read_in_order_with_the_separator_after_each(
    corpus: Read, tmp_path: Path
) -> None:
    paths = [_written(tmp_path, VERSE, "b.txt"), _written(tmp_path, "An end.\n" * 9, "a.txt")]
    whole = VERSE + "<|end|>" + "An end.\n" * 9 + "<|end|>"
    for tokenizer in ("char", "byte", "bpe"):
        data = corpus(path=paths, separator="<|end|>", tokenizer=tokenizer, validation_fraction=0.0)
        assert _text_of(data, data.train.tokens) == whole
    assert data.train.tokens.tolist().count(0) == 2  # the last was bpe: one token each


def test_the_vocabulary_size_is_the_tokenizers_or_rounded_up(corpus: Read) -> None:
    assert corpus().vocab_size == len(set(VERSE))
    assert corpus(vocab_size=64).vocab_size == 64
    assert corpus(tokenizer="byte").vocab_size == 256
    assert corpus(tokenizer="bpe", vocab_size=270).vocab_size == 270


def test_a_tokenizer_json_gives_the_tokens_of_the_text(corpus: Read, tmp_path: Path) -> None:
    learned = corpus(tokenizer="bpe", vocab_size=280)
    path = tmp_path / "tokenizer.json"
    path.write_text(learned.tokenizer.to_json())  # type: ignore[union-attr]
    loaded = corpus(tokenizer=path)
    assert loaded.fingerprint == learned.fingerprint
    assert loaded.train.tokens.tolist() == learned.train.tokens.tolist()


def test_bpe_is_learned_from_the_training_text_alone(corpus: Read, tmp_path: Path) -> None:
    held_out = _written(tmp_path, "zyzyzyzyzyzyzyzyzyzyzyzyzyzyzyzyzyz", "held.txt")
    data = corpus(tokenizer="bpe", validation_path=held_out)
    assert data.tokenizer is not None
    assert len(data.tokenizer.encode("zyzy")) == 4


def test_an_alphabet_of_more_than_65536_characters_is_stored_in_32_bits(
    corpus: Read, tmp_path: Path
) -> None:
    letters = "".join(chr(i) for i in range(0x20, 0x12000) if not 0xD800 <= i < 0xE000)
    data = corpus(path=_written(tmp_path, letters), validation_fraction=0.0)
    assert data.train.tokens.dtype == np.uint32
    assert data.vocab_size == len(letters) > 1 << 16
    for row in _samples(data, 0, 50):
        assert _text_of(data, row) in letters


def test_a_second_run_reads_the_cache_of_the_first_one(
    corpus: Read, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = tmp_path / "kept"
    first = corpus(cache_dir=kept, tokenizer="bpe")
    times = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    second = corpus(cache_dir=kept, tokenizer="bpe")
    assert {path: path.stat().st_mtime_ns for path in kept.iterdir()} == times
    assert second.train.tokens.tolist() == first.train.tokens.tolist()
    for path in kept.glob("*.tokens"):
        path.write_bytes(path.read_bytes()[:-1])
    third = corpus(cache_dir=kept, tokenizer="bpe")
    assert third.fingerprint == first.fingerprint
    assert "damaged" in caplog.text


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """Two passes over 120 MB need less than a third of that, measured in a separate process."""
    path = tmp_path / "large.txt"
    block = ("Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.\n" * 15_000).encode()
    with path.open("wb") as file:
        for _ in range(120):
            file.write(block)
    code = """import resource, sys
from pathlib import Path
from fundamentallm_text import Text, text_reader, token_cache
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
settings = Text(path=Path(sys.argv[1]), tokenizer="char")
reader = text_reader.TextReader(settings, token_cache.TokenCache(), lambda *given: None)
before = peak()
splits = reader.read()
print(peak() - before, len(splits.train.tokens))"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True)
    grown, tokens = map(int, done.stdout.split())
    assert path.stat().st_size > 120e6
    assert tokens > 100e6
    assert grown * 1024 < 40e6


@plugin
class Listen:
    """Records what is reported."""

    @hookimpl
    def on_progress(self, task: str, done: int, total: int | None) -> None:
        REPORTED.append((task, done, total))


REPORTED: list[tuple[str, int, int | None]] = []


def test_tokenizing_is_reported_until_it_is_done(text_run: TextRun, tmp_path: Path) -> None:
    REPORTED.clear()
    size = 2_500_000
    text_run(Listen(), path=_written(tmp_path, "é\n" * (size // 3)), validation_fraction=0.0)
    found = [(done, total) for task, done, total in REPORTED if task == "tokenizing"]
    total = size // 3 * 3
    assert [of for _, of in found] == [total] * len(found)
    assert len(found) > 1
    assert found == sorted(found)
    assert found[-1] == (total, total)


def test_the_standard_library_is_read_by_default(text_run: TextRun) -> None:
    run = text_run(path=None, max_bytes=200_000, context_length=16)
    assert run.outcome == "finished"
    data = run.data
    assert isinstance(data, Corpus)
    assert "import " in _text_of(data, data.train.tokens)
