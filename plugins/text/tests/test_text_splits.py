"""Several named splits: each is validated under its name, on the same windows every time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fundamentallm import DataError, Run, SettingsError, compose, hookimpl, plugin, recorded
from fundamentallm.testing import TinyRun
from fundamentallm_text import Text

VERSE = "The quick brown fox jumps over the lazy dog.\n" * 40
CODE = "def fox(dog):\n    return jumps[over]\n" * 11
LETTERS = "Dear Ünal, the dog is well, and so am I. " * 5

SplitRun = Callable[..., Run]


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


@plugin
class Rows:
    """Keeps the metrics of every validation."""

    def __attrs_post_init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    @hookimpl
    def on_validation_end(self, metrics: dict[str, float]) -> None:
        self.seen.append(metrics)


@pytest.fixture
def split_run(tiny_run: TinyRun, tmp_path: Path) -> SplitRun:
    """Train two steps on a verse, with code and letters as splits of their own."""
    for name, content in (("verse", VERSE), ("code", CODE), ("letters", LETTERS)):
        (tmp_path / f"{name}.txt").write_text(content, encoding="utf-8")

    def start(*in_thread: object, length: int = 2, **text: Any) -> Run:
        splits = {"code": tmp_path / "code.txt", "letters": [tmp_path / "letters.txt"]}
        usual: dict[str, Any] = {"path": tmp_path / "verse.txt", "validation_splits": splits}
        usual |= {"context_length": 8, "batch_size": 4}
        folder = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        return tiny_run(Text(**usual | text), Bigram(), *in_thread, run_dir=folder, length=length)

    return start


def _expected(run: Run, text: str) -> float:
    """Work out a loss by hand: windows of 8 side by side, in batches of 4."""
    assert run.tokenizer is not None
    tokens = torch.tensor(run.tokenizer.encode(text))
    count = (len(tokens) - 1) // 8
    inputs, targets = (tokens[i : i + 8 * count].view(count, 8) for i in (0, 1))
    with torch.no_grad():
        parts = [
            (run.model(inputs[i : i + 4], targets[i : i + 4]).item(), inputs[i : i + 4].numel())
            for i in range(0, count, 4)
        ]
    return math.fsum(loss * size for loss, size in parts) / sum(size for _, size in parts)


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_every_split_has_the_loss_of_a_handwritten_loop(
    split_run: SplitRun, tokenizer: Any
) -> None:
    run = split_run(tokenizer=tokenizer)
    row = run.history[-1]
    assert row["val/loss"] == _expected(run, VERSE[int(len(VERSE) * 0.9) :])
    assert row["code/loss"] == _expected(run, CODE)
    assert row["letters/loss"] == _expected(run, LETTERS)


def test_the_splits_are_the_same_at_every_validation(split_run: SplitRun) -> None:
    data = split_run().data
    one, other = (
        {name: [batch.data for batch in batches] for name, batches in data.validation().items()}
        for _ in range(2)
    )
    assert list(one) == list(other) == ["val", "code", "letters"]
    for name, batches in one.items():
        for mine, theirs in zip(batches, other[name], strict=True):
            assert all(a.equal(b) for a, b in zip(mine, theirs, strict=True))


def test_named_splits_do_not_change_the_training(split_run: SplitRun) -> None:
    with_them, without = (
        split_run(tokenizer="byte", length=4, **more) for more in ({}, {"validation_splits": {}})
    )
    assert with_them.data.fingerprint == without.data.fingerprint
    assert with_them.model.scores.weight.equal(without.model.scores.weight)  # type: ignore[operator]


def test_named_splits_work_without_val(split_run: SplitRun) -> None:
    rows = Rows()
    split_run(rows, validation_fraction=0.0)
    assert [set(metrics) for metrics in rows.seen] == [{"code/loss", "letters/loss"}]


def test_a_named_split_can_be_combined_with_validation_path(
    split_run: SplitRun, tmp_path: Path
) -> None:
    run = split_run(validation_path=tmp_path / "code.txt")
    assert run.history[-1]["val/loss"] == run.history[-1]["code/loss"]


def test_the_bytes_per_token_are_those_of_each_split(split_run: SplitRun) -> None:
    data: Any = split_run().data
    held_out = VERSE[int(len(VERSE) * 0.9) :]
    assert data.bytes_per_token("val") == len(held_out.encode()) / len(held_out)
    assert data.bytes_per_token("letters") == len(LETTERS.encode()) / len(LETTERS) > 1
    assert data.bytes_per_token("no_split") is None
    learned: Any = split_run(tokenizer="bpe").data
    tokens = learned.tokenizer.encode(CODE)
    assert learned.bytes_per_token("code") == len(CODE) / len(tokens)


def test_token_files_can_have_named_splits(split_run: SplitRun, tmp_path: Path) -> None:
    ids = np.arange(400, dtype=np.uint16) % 50
    for name in ("train", "code"):
        np.save(tmp_path / f"{name}.npy", ids)
    splits = {"code": tmp_path / "code.npy"}
    run = split_run(path=tmp_path / "train.npy", vocab_size=50, validation_splits=splits)
    assert set(run.data.validation()) == {"val", "code"}
    assert run.data.bytes_per_token("code") is None  # type: ignore[attr-defined]


def test_a_monitor_finds_the_loss_of_a_split(tmp_path: Path) -> None:
    table = {"path": str(tmp_path / "a.txt"), "validation_splits": {"code": str(tmp_path / "b")}}
    settings: Any = {
        "plugins": ["text", "gpt", "adamw", "checkpoint"],
        "run": {"length": 1},
        "text": table,
    }
    compose(settings | {"checkpoint": {"monitor": "code/loss"}})
    with pytest.raises(SettingsError, match="nothing listed produces 'cod/loss'.*'code/loss'"):
        compose(settings | {"checkpoint": {"monitor": "cod/loss"}})


def test_paths_of_splits_are_relative_to_the_file_that_states_them(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'plugins = ["text", "gpt", "adamw"]\nrun.length = 1\n[text]\npath = "a.txt"\n'
        '[text.validation_splits]\ncode = "b.txt"\nletters = ["c.txt", "d/*.txt"]\n'
    )
    splits = compose(path).plugins["text"].validation_splits
    assert splits == {
        "code": tmp_path / "b.txt",
        "letters": [tmp_path / "c.txt", tmp_path / "d/*.txt"],
    }


def test_the_splits_of_a_run_are_in_its_recorded_settings(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    for name, content in (("verse", VERSE), ("code", CODE)):
        (tmp_path / f"{name}.txt").write_text(content)
    table = {
        "path": str(tmp_path / "verse.txt"),
        "context_length": 8,
        "validation_splits": {"code": str(tmp_path / "code.txt")},
    }
    sizes = {"num_layers": 1, "d_model": 8, "num_heads": 1}
    tables = {"text": table, "gpt": sizes}
    run = tiny_run("text", "gpt", "adamw", settings=tables, length=1)
    again = recorded(run.folder)
    assert again.plugins["text"].validation_splits == {"code": tmp_path / "code.txt"}


@pytest.mark.parametrize("name", ["train", "optim", "best", "Code", "a/b", "a.b", "", "1st", "é"])
def test_a_split_name_that_no_metric_can_begin_with_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot name a split: .* lower-case letters"):
        Text(validation_splits={name: tmp_path})


def test_the_name_val_is_refused_for_a_named_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation_path"):
        Text(validation_splits={"val": tmp_path})


def test_a_split_of_token_files_cannot_be_mixed_with_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text files and token files cannot be mixed"):
        Text(path=tmp_path / "a.txt", validation_splits={"code": tmp_path / "b.bin"})


def test_errors_in_a_split_name_the_split(split_run: SplitRun, tmp_path: Path) -> None:
    def fails(path: Path | list[Path]) -> str:
        with pytest.raises(DataError) as caught:
            split_run(validation_splits={"code": path})
        return str(caught.value)

    verse, short = tmp_path / "verse.txt", tmp_path / "short.txt"
    short.write_text("12345678")
    where = "text.validation_splits.code"
    assert fails(tmp_path / "none") == f"{where}: there is no file {tmp_path / 'none'}"
    assert fails([]) == f"{where}: the list names no file"
    assert fails(verse) == f"{where}: {verse} is also one of the training files"
    assert fails(short).startswith("the held-out 'code' text has 8 tokens; one window of")
