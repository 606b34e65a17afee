"""What reading a corpus results in, and what the reading of text and of tokens have in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from fundamentallm import DataError
from fundamentallm_text.files import find

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm_text import Text
    from fundamentallm_text.store import Tokens
    from fundamentallm_text.vocabularies import Vocabulary

FORMAT = 1
MAIN_SPLIT = "val"

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
    """A corpus: the training tokens, those of each held-out split, and what they mean."""

    train: Split
    held_out: dict[str, Split]
    """By the names that their metrics begin with; "val" is that of the only one, usually."""
    vocabulary: Vocabulary | None
    vocab_size: int
    """Ids a model must know: those of the vocabulary, or as many more as the settings say."""


def padded(own: int, wanted: int | None) -> int:
    """Return how many ids a model must know, given what the tokenizer has and the setting."""
    if wanted is not None and wanted < own:
        raise DataError(f"text.vocab_size is {wanted}, but the tokenizer has {own} tokens")
    return own if wanted is None else wanted


def find_held_out(settings: Text, train: list[Path]) -> dict[str, list[Path]]:
    """Return the files of each split that the settings name, by the name of the split.

    Raises ``DataError`` for what is not there, and if a file is to be trained on and held out.
    """
    splits = settings.validation_splits.items()
    named = {f"validation_splits.{name}": paths for name, paths in splits}
    if settings.validation_path is not None:
        named = {"validation_path": settings.validation_path} | named
    found: dict[str, list[Path]] = {}
    for setting, paths in named.items():
        held_out = find(paths, f"text.{setting}")
        for path in held_out:
            if any(path.samefile(other) for other in train):
                raise DataError(f"text.{setting}: {path} is also one of the training files")
        found[setting.partition(".")[2] or MAIN_SPLIT] = held_out
    return found


def key_of(kind: str, *facts: Any) -> str:
    """Return the name under which what is made of these facts is stored."""
    text = json.dumps([FORMAT, kind, *facts])
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:40]}"
