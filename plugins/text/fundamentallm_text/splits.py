"""The splits of a corpus, and what the readers of text and of token files share."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from fundamentallm import DataError
from fundamentallm_text.files import find

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm_text import Text
    from fundamentallm_text.token_cache import TokenCache, Tokens
    from fundamentallm_text.tokenizers import TextTokenizer

FORMAT = 1
MAIN_SPLIT = "val"

Report: TypeAlias = Callable[[str, int, int | None], None]
"""Called with a task, how much of it is done, and its total."""


@dataclass(frozen=True)
class Split:
    """The tokens of the training text or of a held-out text."""

    tokens: Tokens
    digest: str
    """A hash of the tokens, or of the file they are mapped from."""
    size: int | None = None
    """Bytes of text that the tokens encode, if known."""


@dataclass(frozen=True)
class Splits:
    """The training tokens, those of each held-out split, and their tokenizer."""

    train: Split
    held_out: dict[str, Split]
    """By the names that their metrics begin with, usually "val" only."""
    tokenizer: TextTokenizer | None
    vocab_size: int
    """The ids that a model must have: those of the tokenizer, or more if the settings say so."""


@dataclass
class CorpusReader(ABC):
    """What the readers of text and of token files have in common."""

    settings: Text
    cache: TokenCache
    report: Report
    tokenizer: TextTokenizer | None = None
    """The tokenizer that the run has recorded; None for the one that the settings ask for."""

    @abstractmethod
    def read(self) -> Splits:
        """Return the tokens of every split; raise ``DataError`` for files that cannot be used."""


def padded_vocab_size(own: int, wanted: int | None) -> int:
    """Return the number of ids that a model must have: the tokenizer's, or the larger setting."""
    if wanted is not None and wanted < own:
        raise DataError(f"text.vocab_size is {wanted}, but the tokenizer has {own} tokens")
    return own if wanted is None else wanted


def find_held_out(settings: Text, train: list[Path]) -> dict[str, list[Path]]:
    """Return the files of each split that the settings name, by the name of the split.

    Raises ``DataError`` for a missing file, and for one that is also a training file.
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


def cache_key(kind: str, *facts: Any) -> str:
    """Return the cache key of something that these facts determine."""
    text = json.dumps([FORMAT, kind, *facts])
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:40]}"
