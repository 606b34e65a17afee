"""Tokenizers encode text to ids and decode them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm import DataError
from fundamentallm_text.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    LibraryTokenizer,
    TextTokenizer,
    collect_alphabet,
    learn_bpe,
    load_tokenizer,
    parse_tokenizer,
)

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
LEARNED = learn_bpe(["the cat and the hat\n" * 20], 400, 300, "<|end|>")


@given(text=ANY_TEXT)
def test_every_tokenizer_decodes_what_it_encoded(text: str) -> None:
    known: list[TextTokenizer] = [ByteTokenizer(), CharTokenizer(collect_alphabet([text])), LEARNED]
    for tokenizer in known:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)


@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=4))
def test_chunks_are_encoded_separately(texts: list[str]) -> None:
    known: list[TextTokenizer] = [ByteTokenizer(), CharTokenizer(collect_alphabet(texts)), LEARNED]
    for tokenizer in known:
        apart = [token for text in texts for token in tokenizer.encode(text)]
        assert tokenizer.encode_chunks(texts).tolist() == apart


def test_the_alphabet_is_every_character_once_in_order() -> None:
    assert collect_alphabet(["banana\n", "ßé🦊", "b"]) == "\nabnßé🦊"


def test_a_character_outside_the_alphabet_is_an_error_that_shows_both() -> None:
    with pytest.raises(DataError, match=r"'x' is none of the 3 characters .*: abc"):
        CharTokenizer("abc").encode("abxc")


def test_ids_beyond_the_vocabulary_decode_without_an_error() -> None:
    assert CharTokenizer("ab").decode([0, 7, 1]) == "a\N{REPLACEMENT CHARACTER}b"
    assert ByteTokenizer().decode([104, 300, 105, 255]) == "hi\N{REPLACEMENT CHARACTER}"
    assert LEARNED.decode([LEARNED.encode("t")[0], 10_000]) == "t"


def test_bytes_that_are_not_utf8_can_be_encoded() -> None:
    piece = b"caf\xe9".decode("utf-8", ByteTokenizer.errors)
    assert ByteTokenizer().encode_chunks([piece]).tolist() == [99, 97, 102, 0xE9]


def test_the_separator_is_one_token_of_a_learned_tokenizer() -> None:
    assert LEARNED.encode("<|end|>") == [0]
    assert LEARNED.encode("hat<|end|>the").count(0) == 1
    assert LEARNED.decode([0]) == "<|end|>"


def test_learning_is_bounded_by_the_requested_size_and_by_the_text() -> None:
    assert learn_bpe(["abababab" * 50, "cdcd"], 404, 258, "").vocab_size == 258
    assert learn_bpe(["ab"], 2, 1000, "").vocab_size < 260


def test_learning_gives_the_same_tokenizer_in_every_process() -> None:
    # Ties everywhere: each pair of letters occurs as often as any other.
    words = " ".join(f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst")
    code = (
        "import sys; from fundamentallm_text.tokenizers import learn_bpe\n"
        "print(learn_bpe([sys.argv[1]], 100, 300, '<|end|>').identity)"
    )
    command = [sys.executable, "-c", code, words]
    found = {subprocess.run(command, capture_output=True, check=True).stdout for _ in range(2)}
    assert len(found) == 1


def test_a_loaded_tokenizer_keeps_its_tokens_but_not_its_length_limit(tmp_path: Path) -> None:
    facts = json.loads(LEARNED.to_json())
    facts["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(facts))
    loaded = load_tokenizer(path)
    text = "the cat and the hat " * 9
    assert loaded.encode(text) == LEARNED.encode(text)
    assert loaded.encode_chunks([text]).tolist() == LEARNED.encode(text)
    assert loaded.identity == LEARNED.identity


def test_different_tokenizers_have_different_identities() -> None:
    known: list[TextTokenizer] = [
        ByteTokenizer(),
        CharTokenizer("ab"),
        CharTokenizer("abc"),
        LEARNED,
    ]
    assert len({tokenizer.identity for tokenizer in known}) == 4
    assert isinstance(LEARNED, LibraryTokenizer)


@pytest.mark.parametrize("content", ["", "{}", "not json", "[1]"])
def test_a_file_that_is_no_tokenizer_is_an_error_that_names_it(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer: .*tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(path)
    with pytest.raises(DataError, match=r"there is no file .*none\.json"):
        load_tokenizer(tmp_path / "none.json")


@given(text=ANY_TEXT)
def test_the_tokenizers_library_reads_to_json_and_encodes_the_same_ids(text: str) -> None:
    for tokenizer in (CharTokenizer("".join(sorted({*text, "a"}))), ByteTokenizer(), LEARNED):
        theirs = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)


def test_eos_id_is_the_id_of_a_separator_that_is_one_token() -> None:
    assert LEARNED.eos_id == LEARNED.encode("<|end|>")[0]
    assert CharTokenizer("ab\n", "\n").eos_id == 2
    assert ByteTokenizer("\0").eos_id == 0
    for none in (CharTokenizer("ab"), CharTokenizer("ab", "ab"), ByteTokenizer("ab")):
        assert none.eos_id is None
    assert parse_tokenizer(LEARNED.to_json(), "the cat and").eos_id is None


def test_eos_id_of_a_tokenizer_json_is_its_usual_end_token() -> None:
    assert parse_tokenizer(LEARNED.to_json()).eos_id is None
    llama = learn_bpe(["the hat\n" * 20], 160, 280, "</s>").to_json()
    assert parse_tokenizer(llama).eos_id == 0
