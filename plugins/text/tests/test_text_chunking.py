"""Text is split into byte ranges and chunks by its content, never by how it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fundamentallm import DataError
from fundamentallm_text.chunking import chunks, decode_file, group_chunks, split_text
from fundamentallm_text.files import FileRange, find, split_files, standard_library, whole_files
from fundamentallm_text.tokenizers import learn_bpe

# Words, blanks and newlines in every arrangement: where the cuts of a tokenizer are delicate.
PROSE = st.lists(st.sampled_from(["a", "bc", " ", "\n", "\r\n", "\t", ".", "é", "1", "d'e", "…"]))
TEXTS = PROSE.map("".join)
same_folder = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_chunks_end_at_newlines_between_words() -> None:
    text = "one\ntwo\n\nthree\n  four\nfive"
    assert list(split_text([text], at_least=2, at_most=100)) == [
        "one\n",
        "two\n\nthree\n  four\n",
        "five",
    ]


def test_text_without_such_a_newline_is_split_after_another_newline_or_at_the_limit() -> None:
    assert list(split_text(["ab\n\ncd\n\nefghijklmnop"], 2, 6)) == [
        "ab\n\n",
        "cd\n\n",
        "efghij",
        "klmnop",
    ]


@given(text=TEXTS, at_least=st.integers(1, 9), more=st.integers(1, 9), block=st.integers(1, 30))
def test_chunks_do_not_depend_on_how_the_text_is_read(
    text: str, at_least: int, more: int, block: int
) -> None:
    at_most = at_least + more
    whole = list(split_text([text], at_least, at_most))
    read = (text[i : i + block] for i in range(0, len(text), block))
    assert list(split_text(read, at_least, at_most)) == whole
    assert "".join(whole) == text
    assert all(len(piece) <= at_most for piece in whole)
    assert all(len(piece) >= at_least for piece in whole[:-1])


WIDE = "a bc\n\n\n\nbc a..\n\n  \n\t\ta d'e é\r\n\r\n\r\n    bc 1 11 \n"
PAIRS = learn_bpe([WIDE * 9], 100, 300, "")


@given(text=TEXTS)
def test_the_tokens_of_chunks_are_the_tokens_of_the_whole_text(text: str) -> None:
    found = [token for part in split_text([text], 2, 10_000) for token in PAIRS.encode(part)]
    assert found == PAIRS.encode(text)


def test_splitting_at_any_newline_would_change_the_tokens() -> None:
    """What the rule is for: were this not so, the rule could be simpler."""
    text = "a\n\nbc"
    cut_anywhere = [token for part in ("a\n\n", "bc") for token in PAIRS.encode(part)]
    assert cut_anywhere != PAIRS.encode(text)


@same_folder
@given(text=st.text(max_size=40), block=st.integers(1, 7))
def test_text_is_decoded_the_same_in_any_block_size(tmp_path: Path, text: str, block: int) -> None:
    path = tmp_path / "text"
    data = text.encode("utf-8", "surrogatepass")
    path.write_bytes(data)
    extent = FileRange(path, 0, len(data))
    read = "".join(decode_file(extent, "surrogateescape", block))
    assert read.encode("utf-8", "surrogateescape") == data


@same_folder
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), at=st.integers(0, 200))
def test_splitting_files_never_splits_a_character(tmp_path: Path, text: str, at: int) -> None:
    names = [tmp_path / "a", tmp_path / "b"]
    names[0].write_bytes(text.encode())
    names[1].write_bytes((text + "…").encode())
    whole = whole_files(names)
    before, after = split_files(whole, at)
    size = sum(part.size for part in before)
    assert max(0, at - 3) <= size <= at or (size < at and not after)
    assert "".join(chunks([*before, *after], "", "strict")) == text + text + "…"
    assert "".join(chunks(before, "", "strict")) + "".join(chunks(after, "", "strict")) == (
        text + text + "…"
    )


def test_the_separator_follows_every_end_of_a_file_and_no_other_split(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 4)
    before, after = split_files(whole_files([tmp_path / "a", tmp_path / "b"]), 6)
    assert "".join(chunks(before, "|", "strict")) == "aaaa|bb"
    assert "".join(chunks(after, "|", "strict")) == "bb|"


@pytest.mark.parametrize("block", [1, 3, 100])
def test_bytes_that_are_not_utf8_are_reported_with_file_and_offset(
    tmp_path: Path, block: int
) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("schön café".encode() + b" caf\xe9 ")
    with pytest.raises(DataError, match=r"latin\.txt: byte 16 \(0xe9\) is not UTF-8 text"):
        list(decode_file(FileRange(path, 3, path.stat().st_size), block=block))


def test_groups_have_about_the_requested_size() -> None:
    assert list(group_chunks(["aa", "b", "cccc", "d"], 3)) == [["aa", "b"], ["cccc"], ["d"]]


def test_the_standard_library_is_a_deterministic_list_without_tests() -> None:
    found = standard_library()
    assert found == standard_library()
    assert len(found) > 100
    assert not [path for path in found if {"test", "tests", "site-packages"} & set(path.parts)]
    assert "json" in {path.parent.name for path in found}
    # Not in the order of the alphabet: the end is held out, and should be a sample of everything.
    assert found != sorted(found)


def test_a_pattern_finds_files_in_sorted_order_and_a_list_keeps_its_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.txt").touch()
    a, b, c = (tmp_path / name for name in ("a.txt", "b.txt", "c.md"))
    assert find(tmp_path / "*.txt", "text.path") == [a, b]
    assert find([c, tmp_path / "*.txt", c], "text.path") == [c, a, b]


def test_a_path_with_brackets_is_a_file_name_if_that_file_exists(tmp_path: Path) -> None:
    path = tmp_path / "notes[1].txt"
    path.write_text("x")
    assert find(path, "text.path") == [path]


def test_the_library_encodes_a_batch_as_it_encodes_one_text() -> None:
    """``encode_batch_fast`` is what long texts go through; it must not differ."""
    texts = ["a bc\n", "é 1 d'e", " "]
    assert PAIRS.encode_chunks(texts).tolist() == [t for text in texts for t in PAIRS.encode(text)]
