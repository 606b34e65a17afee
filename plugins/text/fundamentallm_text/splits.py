"""What reading a corpus results in, and what the reading of text and of tokens have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from fundamentallm import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm_text.store import Tokens
    from fundamentallm_text.vocabularies import Vocabulary

FORMAT = 1

Report: TypeAlias = Callable[[str, int, int | None], None]
"""Told of a task, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Split:
    """The tokens of training, or those held out."""

    tokens: Tokens
    digest: str
    """Changes exactly if the tokens do."""
    size: int | None = None
    """Bytes of text that the tokens stand for, if known."""


@dataclass(frozen=True)
class Splits:
    """A corpus: the training tokens, the held-out ones, and what they mean."""

    train: Split
    held_out: Split | None
    vocabulary: Vocabulary | None
    vocab_size: int
    """Ids a model must know: those of the vocabulary, or as many more as the settings say."""


def padded(own: int, wanted: int | None) -> int:
    """Return how many ids a model must know, given what the tokenizer has and the setting."""
    if wanted is not None and wanted < own:
        raise DataError(f"text.vocab_size is {wanted}, but the tokenizer has {own} tokens")
    return own if wanted is None else wanted


def check_apart(train: list[Path], held_out: list[Path]) -> None:
    """Raise ``DataError`` if a file is to be trained on and held out."""
    for path in held_out:
        if any(path.samefile(other) for other in train):
            raise DataError(f"text.validation_path: {path} is also one of the training files")


def key_of(kind: str, *facts: Any) -> str:
    """Return the name under which what is made of these facts is stored."""
    text = json.dumps([FORMAT, kind, *facts])
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:40]}"
