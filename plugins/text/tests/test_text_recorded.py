"""A run that is loaded and not trained answers from its folder, and reads the text only if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fundamentallm import DataError, Run, load_run, train

TEXT = "the cat and the hat\n" * 40


def trained(folder: Path, **text: Any) -> Run:
    """Train a tiny model on text or token files in ``folder``, and return the finished run."""
    path = folder / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    settings = {
        "plugins": ["text", "gpt", "adamw", "checkpoint"],
        "run": {"length": 2, "device": "cpu", "validate_every": 2},
        "text": {"path": str(path), "context_length": 8, "batch_size": 2, **text},
        "gpt": {"num_layers": 1, "num_heads": 1, "d_model": 8},
    }
    return train(settings, run_dir=folder / "run")


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_a_loaded_run_has_its_tokenizer_and_sizes_without_the_text(
    tmp_path: Path, tokenizer: str
) -> None:
    before = trained(tmp_path, tokenizer=tokenizer, vocab_size=300, separator="\n")
    (tmp_path / "corpus.txt").unlink()
    data: Any = load_run(tmp_path / "run").data
    assert data.tokenizer.encode("the hat") == before.tokenizer.encode("the hat")
    assert data.tokenizer.eos_id == before.tokenizer.eos_id
    assert (data.vocab_size, data.context_length) == (300, 8)
    for use in (data.validation, lambda: data.fingerprint, lambda: data.bytes_per_token("val")):
        with pytest.raises(DataError, match=r"text\.path: there is no file .*corpus\.txt"):
            use()
    data.close()


def test_a_loaded_run_reads_the_text_when_its_batches_are_used(tmp_path: Path) -> None:
    before = trained(tmp_path)
    loaded = load_run(tmp_path / "run")
    data: Any = loaded.data
    assert data.fingerprint == before.data.fingerprint
    mine, theirs = (run.data.validation()["val"] for run in (loaded, before))
    for one, other in zip(mine, theirs, strict=True):
        assert all(a.equal(b) for a, b in zip(one.data, other.data, strict=True))
    first = next(data.batches(loaded.progress))
    assert first.first == loaded.progress.samples
    data.close()


def test_token_files_without_a_tokenizer_are_not_read_by_a_loaded_run(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.arange(900) % 77)
    trained(tmp_path, path=str(tokens), vocab_size=77)
    tokens.unlink()
    data: Any = load_run(tmp_path / "run").data
    assert (data.tokenizer, data.vocab_size, data.context_length) == (None, 77, 8)


def test_a_loaded_run_without_its_tokenizer_file_reads_the_text(tmp_path: Path) -> None:
    trained(tmp_path)
    (tmp_path / "run" / "tokenizer.json").unlink()
    data: Any = load_run(tmp_path / "run").data
    assert data.vocab_size == len(set(TEXT))
