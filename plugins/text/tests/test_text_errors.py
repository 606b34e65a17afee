"""Data that cannot be trained on: each says where, what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fundamentallm import DataError, SettingsError
from fundamentallm.testing import TinyRun
from fundamentallm_text import Text
from fundamentallm_text.chunking import decode_file
from fundamentallm_text.files import FileRange
from fundamentallm_text.tokenizers import learn_bpe

Fails = Callable[..., str]


@pytest.fixture
def fails(tiny_run: TinyRun, tmp_path: Path) -> Fails:
    """Start a run with a text plugin of these settings and return how it fails."""

    def start(**text: Any) -> str:
        with pytest.raises(DataError) as caught:
            tiny_run(Text(**{"context_length": 8} | text), run_dir=tmp_path / "run")
        assert caught.value.exit_code == 4
        return str(caught.value)

    return start


def _file(folder: Path, name: str, content: bytes = b"some words, enough of them" * 9) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_a_missing_file_is_an_error(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "none.txt"
    assert fails(path=path) == f"text.path: there is no file {path}"


def test_a_missing_validation_file_is_an_error(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "none.txt"
    text = fails(path=_file(tmp_path, "a.txt"), validation_path=path)
    assert text == f"text.validation_path: there is no file {path}"


def test_a_pattern_that_matches_nothing_is_an_error(fails: Fails, tmp_path: Path) -> None:
    pattern = tmp_path / "*.md"
    assert fails(path=pattern) == f"text.path: no file that is not empty matches {pattern}"


def test_a_folder_as_path_is_an_error(fails: Fails, tmp_path: Path) -> None:
    assert f"{tmp_path} is a folder; name its files with a pattern: " in fails(path=tmp_path)


def test_an_empty_list_of_files_is_an_error(fails: Fails) -> None:
    assert fails(path=[]) == "text.path: the list names no file"


def test_an_empty_file_is_an_error(fails: Fails, tmp_path: Path) -> None:
    path = _file(tmp_path, "empty.txt", b"")
    assert fails(path=path) == f"text.path: {path} is empty"


def test_a_path_below_a_file_is_an_error(fails: Fails, tmp_path: Path) -> None:
    path = _file(tmp_path, "a.txt") / "b.txt"
    assert fails(path=path) == f"text.path: there is no file {path}"


def test_a_file_name_that_is_too_long_is_an_error(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 999)
    assert fails(path=path) == f"{path} cannot be read: File name too long"


def test_a_file_that_disappears_during_reading_is_an_error(tmp_path: Path) -> None:
    extent = FileRange(tmp_path / "gone.txt", 0, 9)
    with pytest.raises(DataError, match=r"gone\.txt cannot be read: No such file"):
        list(decode_file(extent))
    _file(tmp_path, "gone.txt", b"1234")
    with pytest.raises(DataError, match=r"gone\.txt became shorter while it was read"):
        list(decode_file(extent))


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_training_text_shorter_than_a_window_is_an_error(
    fails: Fails, tmp_path: Path, tokenizer: Any
) -> None:
    path = _file(tmp_path, "short.txt", b"12345678")
    assert fails(path=path, validation_fraction=0.0, tokenizer=tokenizer) == (
        "the training text has 8 tokens; one window of text.context_length = 8 needs 9: "
        "reduce it, or give more text"
    )
    assert fails(path=path, validation_fraction=0.95, tokenizer=tokenizer).startswith(
        "the training text has 0 tokens; one window"
    )


def test_held_out_text_shorter_than_a_window_is_an_error(fails: Fails, tmp_path: Path) -> None:
    path = _file(tmp_path, "a.txt", b"x" * 80)
    assert fails(path=path, validation_fraction=0.1) == (
        "the held-out text has 8 tokens; one window of text.context_length = 8 needs 9: "
        "reduce it, or give more held-out text (text.validation_fraction = 0 for none)"
    )


def test_a_file_for_both_training_and_validation_is_an_error(fails: Fails, tmp_path: Path) -> None:
    path = _file(tmp_path, "a.txt")
    text = fails(path=tmp_path / "*.txt", validation_path=path)
    assert text == f"text.validation_path: {path} is also one of the training files"


def test_bytes_that_are_not_text_are_an_error(fails: Fails, tmp_path: Path) -> None:
    path = _file(tmp_path, "a.txt", b"x" * 100 + b"\xff" + b"x" * 100)
    for tokenizer in ("char", "bpe"):
        assert fails(path=path, tokenizer=tokenizer) == (
            f"{path}: byte 100 (0xff) is not UTF-8 text; convert the file, or train on its bytes "
            'with tokenizer = "byte"'
        )


def test_a_tokenizer_larger_than_vocab_size_is_an_error(fails: Fails, tmp_path: Path) -> None:
    path = _file(tmp_path, "a.txt", b"abcd" * 99)
    assert fails(path=path, vocab_size=3) == (
        "text.vocab_size is 3, but the tokenizer has 4 tokens"
    )


def test_a_file_that_is_no_tokenizer_is_an_error(fails: Fails, tmp_path: Path) -> None:
    path = _file(tmp_path, "t.json", b"{")
    text = fails(path=_file(tmp_path, "a.txt"), tokenizer=path)
    assert text.startswith(f"text.tokenizer: {path} is not a tokenizer.json: ")


def test_a_bin_of_an_odd_size_is_an_error(fails: Fails, tmp_path: Path) -> None:
    path = _file(tmp_path, "a.bin", bytes(99))
    assert fails(path=path, vocab_size=9) == (
        f"{path}: 99 bytes are not a whole number of uint16 tokens; "
        "set text.dtype to the type of its tokens"
    )


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.zeros(99), "its type is <f8, not one of uint8, uint16, uint32, int16, int32, int64"),
        (np.zeros(99, dtype=">u2"), "its type is >u2, not one of"),
        (np.zeros(99, dtype=bool), "its type is |b1, not one of"),
        (np.zeros((9, 11), dtype=np.uint16), "its shape is (9, 11), but tokens need one dimension"),
        (np.array([{}]), "is not a .npy file of numbers: "),
    ],
)
def test_an_npy_that_is_no_array_of_ids_is_an_error(
    fails: Fails, tmp_path: Path, array: Any, why: str
) -> None:
    path = tmp_path / "a.npy"
    np.save(path, array)
    assert why in fails(path=path, vocab_size=9)


def test_a_file_that_is_no_npy_is_an_error(fails: Fails, tmp_path: Path) -> None:
    path = _file(tmp_path, "a.npy")
    assert f"{path} is not a .npy file of numbers: " in fails(path=path, vocab_size=9)


@pytest.mark.parametrize("wrong", [9, -1])
def test_token_ids_outside_the_vocabulary_are_an_error(
    fails: Fails, tmp_path: Path, wrong: int
) -> None:
    tokens = np.zeros(99, dtype=np.int32)
    tokens[[50, 60]] = wrong
    path = tmp_path / "a.npy"
    np.save(path, tokens)
    assert fails(path=path, vocab_size=9) == (
        f"{path}: token 50 is {wrong}, outside a vocabulary of 9; check text.vocab_size, the "
        "number of ids, and text.dtype, their type in the file"
    )


def test_token_files_without_tokens_are_an_error(fails: Fails, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(0, dtype=np.uint16))
    assert "training text has 0 tokens" in fails(path=tmp_path / "a.npy", vocab_size=9)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (
            {"tokenizer": "bpee"},
            'tokenizer: must be "char", "byte", "bpe" or the path of a tokenizer.json, not "bpee"',
        ),
        ({"batch_size": 10**20}, "batch_size: must be <= 1000000000"),
        ({"context_length": 10**9 + 1}, "context_length: must be <= 1000000000"),
        ({"vocab_size": 10**20}, "vocab_size: must be <= 1000000000"),
        ({"validation_batches": 10**20}, "validation_batches: must be <= 1000000000"),
        ({"prefetch": 10**20}, "prefetch: must be <= 1000000000"),
        (
            {"tokenizer": "bpe", "vocab_size": 255},
            "vocab_size: a learned tokenizer has at least 256",
        ),
        ({"path": ["a.bin", "b.txt"], "vocab_size": 9}, "path: text files and token files"),
        ({"path": ["b.txt", "a.bin"]}, "path: text files and token files"),
        ({"path": "a.bin"}, "vocab_size: is required for token files"),
        ({"path": "a.bin", "vocab_size": 9, "tokenizer": "char"}, "tokenizer: token files contain"),
        ({"path": "a.npy", "vocab_size": 9, "separator": "x"}, "separator: works with text"),
        ({"path": "a.npy", "vocab_size": 9, "max_bytes": 9}, "max_bytes: works with text"),
        ({"source": "wikipedia"}, "source: unknown value"),
        ({"validation_fraction": 1.0}, "validation_fraction: must be < 1"),
        ({"validation_fraction": -0.1}, "validation_fraction: must be >= 0"),
        ({"batch_size": 0}, "batch_size: must be >= 1"),
        ({"context_length": 0}, "context_length: must be >= 1"),
        ({"prefetch": -1}, "prefetch: must be >= 0"),
        ({"validation_batches": 0}, "validation_batches: must be >= 1"),
    ],
)
def test_contradictory_settings_are_an_error(
    tiny_run: TinyRun, table: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        tiny_run("text", settings={"text": table})
    assert f"text.{problem}" in str(caught.value)


def test_a_mistyped_tokenizer_is_reported_together_with_other_mistakes(tiny_run: TinyRun) -> None:
    with pytest.raises(SettingsError) as caught:
        tiny_run("text", settings={"text": {"tokenizer": "chr", "batch_size": 0, "sise": 1}})
    assert len(caught.value.problems) == 3
    assert "\"chr\" (did you mean 'char'?)" in str(caught.value)


def test_a_learned_tokenizer_can_be_as_small_as_the_bytes() -> None:
    assert Text(tokenizer="bpe", vocab_size=256).vocab_size == 256
    with pytest.raises(ValueError, match="at least 257"):
        Text(tokenizer="bpe", vocab_size=256, separator="|")


def test_an_error_is_not_cached_once_the_data_is_right(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.full(99, 9, dtype=np.uint16))
    assert "outside a vocabulary of 9" in fails(path=path, vocab_size=9)
    assert "outside a vocabulary of 8" in fails(path=path, vocab_size=8)
    known = tmp_path / "t.json"
    known.write_text(learn_bpe(["ab"], 2, 256, "").to_json())
    assert "the tokenizer has" in fails(path=path, vocab_size=8, tokenizer=known)
