"""A run continues with the tokenizer that it started with, even if the text has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from torch import Tensor, nn

from fundamentallm import DataError, PluginError, Run, StorageError, hookimpl, plugin
from fundamentallm.testing import TinyRun
from fundamentallm_text import Text
from fundamentallm_text.corpus import Corpus
from fundamentallm_text.tokenizers import learn_bpe

BEFORE = "the cat and the hat\n" * 60
AFTER = "hat then at the end\n" * 60  # every character of it occurs before

Start = Callable[..., Corpus]
Refused = Callable[..., str]


@plugin
class Scores:
    """A score for each token."""

    @hookimpl
    def build_model(self, run: Run) -> nn.Module:
        class Table(nn.Module):
            def __init__(self, vocab_size: int) -> None:
                super().__init__()
                self.scores = nn.Embedding(vocab_size, 1)

            def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                loss: Tensor = self.scores(inputs).square().mean()
                return loss

        return Table(run.data.vocab_size)  # type: ignore[attr-defined]


@pytest.fixture
def start(tiny_run: TinyRun, tmp_path: Path) -> Start:
    """Start a run in one and the same folder, on a corpus of this content; return its data."""

    def run(content: str = BEFORE, *in_thread: object, folder: str = "run", **text: Any) -> Corpus:
        path = tmp_path / "corpus.txt"
        path.write_text(content, encoding="utf-8")
        usual: dict[str, Any] = {"path": path, "context_length": 8, "batch_size": 2}
        data = tiny_run(
            Text(**usual | text), Scores(), *in_thread, run_dir=tmp_path / folder, length=1
        ).data
        assert isinstance(data, Corpus)
        return data

    return run


@pytest.fixture
def refused(start: Start) -> Refused:
    """Start a run and return how that fails."""

    def message(*given: Any, **text: Any) -> str:
        with pytest.raises(DataError) as caught:
            start(*given, **text)
        return str(caught.value)

    return message


def _known(data: Corpus) -> tuple[Any, int, str]:
    assert data.tokenizer is not None
    tokens = [*data.train.tokens.tolist(), *data.held_out["val"].tokens.tolist()]
    return data.tokenizer.identity, data.vocab_size, data.tokenizer.decode(tokens)


@pytest.mark.parametrize(
    "text",
    [
        {"tokenizer": "char"},
        {"tokenizer": "char", "vocab_size": 64},
        {"tokenizer": "byte"},
        {"tokenizer": "bpe", "vocab_size": 260},
        {"tokenizer": "bpe", "vocab_size": 999},  # more than there is to learn
        {"tokenizer": "bpe"},
    ],
)
def test_a_run_keeps_its_tokenizer_when_the_text_changes(start: Start, text: Any) -> None:
    identity, vocab_size, written = _known(start(**text))
    assert written == BEFORE
    assert _known(start(AFTER, **text)) == (identity, vocab_size, AFTER)
    if text["tokenizer"] != "byte":
        assert _known(start(AFTER, folder="another", **text))[0] != identity


def test_text_with_new_characters_is_an_error_in_a_char_run(
    refused: Refused, start: Start, tmp_path: Path
) -> None:
    start()
    assert refused(BEFORE.replace("c", "k")) == (
        f"{tmp_path / 'corpus.txt'}: the character 'k' is not in the alphabet that this run was "
        "started with; restore the text, or start a new run"
    )


def test_the_file_with_an_unknown_character_is_named(
    refused: Refused, start: Start, tmp_path: Path
) -> None:
    other = tmp_path / "b.txt"
    other.write_text(BEFORE)
    start(validation_path=other)
    other.write_text(BEFORE + "ß")
    assert refused(validation_path=other).startswith(
        f"{other}: the character 'ß' is not in the alphabet"
    )


def test_an_unknown_character_of_the_separator_is_an_error_that_names_the_setting(
    refused: Refused, start: Start
) -> None:
    start()
    assert refused(separator="|").startswith(
        "text.separator: the character '|' is not in the alphabet"
    )


def test_another_version_of_the_tokenizers_library_changes_no_run(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = start(tokenizer="bpe", vocab_size=280)
    kept = (tmp_path / "run" / "tokenizer.json").read_bytes()
    monkeypatch.setattr(tokenizers, "__version__", "99")
    assert start(tokenizer="bpe", vocab_size=280).fingerprint == first.fingerprint
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == kept


def test_a_learned_tokenizer_is_written_as_a_file_that_another_run_can_use(
    start: Start, tmp_path: Path
) -> None:
    first = start(tokenizer="bpe", vocab_size=280)
    path = tmp_path / "run" / "tokenizer.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    assert (facts["kind"], facts["vocab_size"]) == ("bpe", 280)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(facts["content"]))
    assert first.tokenizer is not None
    assert theirs.encode(BEFORE).ids == first.tokenizer.encode(BEFORE)
    assert start(folder="another", tokenizer=path).fingerprint == first.fingerprint


def test_an_alphabet_is_stored_as_a_string(start: Start, tmp_path: Path) -> None:
    start('ab\r\n\x85\u2028"\\ß🦊' * 60)
    facts = json.loads((tmp_path / "run" / "tokenizer.json").read_text(encoding="utf-8"))
    assert facts == {"kind": "char", "vocab_size": 10, "content": '\n\r"\\ab\x85ß\u2028🦊'}
    start('ab\r\n\x85\u2028"\\ß🦊' * 60)


SWITCHES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"tokenizer": "char"},
        {"tokenizer": "byte"},
        'text.tokenizer: the settings ask for "byte", but this run was started with "char" (',
    ),
    (
        {"tokenizer": "byte"},
        {},
        'text.tokenizer: the settings ask for "char", but this run was started with "byte" (',
    ),
    (
        {"tokenizer": "bpe", "vocab_size": 270},
        {"tokenizer": "bpe", "vocab_size": 280},
        "text.vocab_size is 280, but this run was started with a vocabulary of 270 (",
    ),
    (
        {"tokenizer": "bpe", "vocab_size": 270},
        {"tokenizer": "bpe", "vocab_size": 260},
        "text.vocab_size is 260, but this run was started with a vocabulary of 270 (",
    ),
    (
        {"vocab_size": 64},
        {},
        "text.vocab_size is not set, but this run was started with a vocabulary of 64 (",
    ),
]


@pytest.mark.parametrize(("before", "after", "problem"), SWITCHES)
def test_asking_a_run_for_another_tokenizer_is_an_error_with_advice(
    start: Start, refused: Refused, before: Any, after: Any, problem: str
) -> None:
    first = start(**before)
    message = refused(**after)
    assert message.startswith(problem)
    assert message.endswith(", or start a new run")
    assert start(**before).fingerprint == first.fingerprint


def _learned(path: Path, text: str) -> Path:
    path.write_text(learn_bpe([text], len(text), 270, "").to_json())
    return path


def test_a_run_has_its_own_copy_of_a_tokenizer_file(
    start: Start, refused: Refused, tmp_path: Path
) -> None:
    path = _learned(tmp_path / "t.json", BEFORE)
    first = start(tokenizer=path)
    assert refused(tokenizer=_learned(path, "zyzzyva " * 9)).startswith(
        f"text.tokenizer: {path} is not the tokenizer that this run was started with ("
    )
    path.unlink()
    assert start(tokenizer=path).fingerprint == first.fingerprint


def test_a_run_on_token_files_has_its_own_copy_of_their_tokenizer(
    start: Start, refused: Refused, tmp_path: Path
) -> None:
    tokens = tmp_path / "a.npy"
    np.save(tokens, np.arange(900) % 99)
    path = _learned(tmp_path / "t.json", BEFORE)
    first = start(path=tokens, tokenizer=path)
    path.unlink()
    assert _known(start(path=tokens, tokenizer=path)) == _known(first)
    assert "ask for none, but this run was started with the tokenizer of a file" in refused(
        path=tokens, vocab_size=270
    )
    assert start(folder="another", path=tokens, vocab_size=270).tokenizer is None
    assert not (tmp_path / "another" / "tokenizer.json").exists()


@plugin
class Second:
    """Makes the run that of a second process."""

    @hookimpl
    def compile_model(self, run: Run, model: nn.Module) -> nn.Module:
        run.rank = 1
        return model


def test_only_the_first_process_writes_the_tokenizer(start: Start, tmp_path: Path) -> None:
    start(BEFORE, Second())
    assert not (tmp_path / "run" / "tokenizer.json").exists()


@plugin
class Unbuilt:
    """Fails before training begins."""

    @hookimpl
    def adapt_model(self) -> None:
        raise RuntimeError("something")


def test_a_start_that_fails_before_training_writes_no_tokenizer(
    start: Start, tmp_path: Path
) -> None:
    with pytest.raises(PluginError):
        start(BEFORE, Unbuilt(), tokenizer="byte")
    assert start(tokenizer="char").vocab_size == len(set(BEFORE))
    assert [path.name for path in (tmp_path / "run").glob("*tokenizer*")] == ["tokenizer.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        "\udcff",
        "{}",
        '{"kind": "char", "vocab_size": 2, "content": "aa"}',
        '{"kind": "char", "vocab_size": 2, "content": "abc"}',
        '{"kind": "char", "vocab_size": "2", "content": "ab"}',
        '{"kind": "byte", "vocab_size": 256, "content": "ab"}',
        '{"kind": "bpe", "vocab_size": 256, "content": "ab"}',
        '{"kind": "word", "vocab_size": 256, "content": "ab"}',
    ],
)
def test_a_damaged_tokenizer_file_is_an_error_that_names_it(
    start: Start, tmp_path: Path, content: str
) -> None:
    start()
    path = tmp_path / "run" / "tokenizer.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(StorageError) as caught:
        start()
    assert str(caught.value).startswith(f"{path} is not the tokenizer of a run (")


def test_a_tokenizer_that_cannot_be_written_is_an_error_that_names_the_file(
    start: Start, tmp_path: Path
) -> None:
    (tmp_path / "run" / ".tokenizer.json.part").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"run/tokenizer\.json: cannot be written: "):
        start()
