"""Token files made by others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fundamentallm_text import Text
from fundamentallm_text.splits import Splits
from fundamentallm_text.token_cache import TokenCache
from fundamentallm_text.token_files import BLOCK, TokenReader
from fundamentallm_text.tokenizers import learn_bpe

IDS = np.arange(1000) % 77


def _read(folder: Path, reported: list[Any] | None = None, **text: Any) -> Splits:
    def report(*given: Any) -> None:
        (reported if reported is not None else []).append(given)

    return TokenReader(
        Text(**{"vocab_size": 77} | text), TokenCache(folder / "store"), report
    ).read()


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_bin_is_mapped_in_place(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "a.bin"
    IDS.astype(dtype).tofile(path)
    found = _read(tmp_path, path=path, dtype=dtype, validation_fraction=0.0)
    assert found.train.tokens.tolist() == IDS.tolist()
    assert found.train.tokens.dtype == dtype
    assert (found.tokenizer, found.vocab_size, found.held_out) == (None, 77, {})
    # Only the fact that the ids were checked is cached.
    assert {kept.name.split("-")[0] for kept in (tmp_path / "store").iterdir()} == {"range"}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int16", "int32", "int64"])
def test_an_npy_of_any_integer_type_is_read(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", IDS.astype(dtype))
    found = _read(tmp_path, path=tmp_path / "a.npy")
    assert found.train.tokens.tolist() == IDS[:900].tolist()
    assert found.held_out["val"].tokens.tolist() == IDS[900:].tolist()


def test_several_files_are_joined(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IDS[:300])
    IDS[300:].astype("uint16").tofile(tmp_path / "b.bin")
    both = [tmp_path / "a.npy", tmp_path / "b.bin"]
    for _ in range(2):
        found = _read(tmp_path, path=both, validation_fraction=0.0)
        assert found.train.tokens.tolist() == IDS.tolist()
        assert found.train.tokens.dtype == np.uint16


def test_other_files_can_be_held_out(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IDS)
    np.save(tmp_path / "b.npy", IDS[::-1].copy())
    found = _read(tmp_path, path=tmp_path / "a.npy", validation_path=tmp_path / "b.npy")
    assert found.train.tokens.tolist() == IDS.tolist()
    assert found.held_out["val"].tokens.tolist() == IDS[::-1].tolist()


def test_a_tokenizer_json_defines_the_vocabulary(tmp_path: Path) -> None:
    learned = learn_bpe(["abc" * 9], 27, 300, "")
    (tmp_path / "t.json").write_text(learned.to_json())
    np.save(tmp_path / "a.npy", IDS)
    settings: dict[str, Any] = {"path": tmp_path / "a.npy", "tokenizer": tmp_path / "t.json"}
    found = _read(tmp_path, **settings, vocab_size=None)
    assert found.vocab_size == learned.vocab_size
    assert found.tokenizer is not None
    assert found.tokenizer.identity == learned.identity
    assert _read(tmp_path, **settings, vocab_size=512).vocab_size == 512


def test_ids_are_checked_once_block_by_block(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    np.zeros(BLOCK + 10, dtype=np.uint16).tofile(path)
    reported: list[Any] = []
    _read(tmp_path, reported, path=path)
    assert reported == [
        ("checking tokens", BLOCK, BLOCK + 10),
        ("checking tokens", BLOCK + 10, BLOCK + 10),
    ]
    _read(tmp_path, reported, path=path)
    assert len(reported) == 2
    _read(tmp_path, reported, path=path, vocab_size=5)
    assert len(reported) == 4
