"""Text to tokens and back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm import DataError
from fundamentallm_text.vocabularies import (
    Bytes,
    Characters,
    Pairs,
    Vocabulary,
    collect_alphabet,
    learn_pairs,
    load_pairs,
)

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
LEARNED = learn_pairs(["the cat and the hat\n" * 20], 400, 300, "<|end|>")


@given(text=ANY_TEXT)
def test_every_tokenizer_gives_back_the_text_it_encoded(text: str) -> None:
    known: list[Vocabulary] = [Bytes(), Characters(collect_alphabet([text])), LEARNED]
    for vocabulary in known:
        tokens = vocabulary.encode(text)
        assert vocabulary.decode(tokens) == text
        assert all(0 <= token < vocabulary.vocab_size for token in tokens)


@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=4))
def test_pieces_are_encoded_as_each_is_on_its_own(texts: list[str]) -> None:
    known: list[Vocabulary] = [Bytes(), Characters(collect_alphabet(texts)), LEARNED]
    for vocabulary in known:
        apart = [token for text in texts for token in vocabulary.encode(text)]
        assert vocabulary.encode_pieces(texts).tolist() == apart


def test_the_alphabet_is_every_character_once_in_order() -> None:
    assert collect_alphabet(["banana\n", "ßé🦊", "b"]) == "\nabnßé🦊"


def test_a_character_outside_the_alphabet_is_an_error_that_shows_both() -> None:
    with pytest.raises(DataError, match=r"'x' is none of the 3 characters .*: abc"):
        Characters("abc").encode("abxc")


def test_ids_beyond_the_vocabulary_decode_to_something_harmless() -> None:
    assert Characters("ab").decode([0, 7, 1]) == "a\N{REPLACEMENT CHARACTER}b"
    assert Bytes().decode([104, 300, 105, 255]) == "hi\N{REPLACEMENT CHARACTER}"
    assert LEARNED.decode([LEARNED.encode("t")[0], 10_000]) == "t"


def test_bytes_that_are_not_text_are_tokens_all_the_same() -> None:
    piece = b"caf\xe9".decode("utf-8", Bytes.errors)
    assert Bytes().encode_pieces([piece]).tolist() == [99, 97, 102, 0xE9]


def test_the_separator_is_one_token_of_a_learned_tokenizer() -> None:
    assert LEARNED.encode("<|end|>") == [0]
    assert LEARNED.encode("hat<|end|>the").count(0) == 1
    assert LEARNED.decode([0]) == "<|end|>"


def test_learning_is_bounded_by_the_vocabulary_asked_for_and_by_the_text() -> None:
    assert learn_pairs(["abababab" * 50, "cdcd"], 404, 258, "").vocab_size == 258
    assert learn_pairs(["ab"], 2, 1000, "").vocab_size < 260


def test_learning_gives_the_same_tokenizer_in_every_process() -> None:
    # Ties everywhere: each pair of letters occurs as often as any other.
    words = " ".join(f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst")
    code = (
        "import sys; from fundamentallm_text.vocabularies import learn_pairs\n"
        "print(learn_pairs([sys.argv[1]], 100, 300, '<|end|>').identity)"
    )
    command = [sys.executable, "-c", code, words]
    found = {subprocess.run(command, capture_output=True, check=True).stdout for _ in range(2)}
    assert len(found) == 1


def test_a_tokenizer_file_keeps_its_tokens_and_loses_its_length_limit(tmp_path: Path) -> None:
    facts = json.loads(LEARNED.to_json())
    facts["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(facts))
    loaded = load_pairs(path)
    text = "the cat and the hat " * 9
    assert loaded.encode(text) == LEARNED.encode(text)
    assert loaded.encode_pieces([text]).tolist() == LEARNED.encode(text)
    assert loaded.identity == LEARNED.identity


def test_identities_tell_tokenizers_apart() -> None:
    known: list[Vocabulary] = [Bytes(), Characters("ab"), Characters("abc"), LEARNED]
    assert len({vocabulary.identity for vocabulary in known}) == 4
    assert isinstance(LEARNED, Pairs)


@pytest.mark.parametrize("content", ["", "{}", "not json", "[1]"])
def test_a_file_that_is_no_tokenizer_is_an_error_that_names_it(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer: .*tokenizer\.json is not a tokenizer\.json"):
        load_pairs(path)
    with pytest.raises(DataError, match=r"there is no file .*none\.json"):
        load_pairs(tmp_path / "none.json")
