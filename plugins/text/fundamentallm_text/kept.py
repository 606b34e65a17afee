"""The tokenizer of a run, kept in its folder: a run goes on with the one that it began with.

``tokenizer.json`` in the run folder is an object of three:

- ``"kind"``: ``"char"``, ``"byte"``, ``"bpe"``, or ``"file"`` where the settings named one;
- ``"vocab_size"``: how many ids the run's model knows;
- ``"content"``: for ``"char"`` the alphabet as one string, a character's place being its id; for
  ``"byte"`` nothing, ``null``; for the others the tokenizer.json of the ``tokenizers`` library,
  which takes none that says more: so the rest cannot stand inside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm import DataError, StorageError
from fundamentallm_text.store import write_whole
from fundamentallm_text.vocabularies import Bytes, Characters, Pairs, load_pairs, parse_pairs

if TYPE_CHECKING:
    from fundamentallm_text import Text
    from fundamentallm_text.vocabularies import Vocabulary

NAME = "tokenizer.json"


@dataclass(frozen=True)
class Kept:
    """A tokenizer, which setting it came of, and how many ids the run's model knows."""

    kind: str
    vocabulary: Vocabulary
    vocab_size: int


def kind_of(settings: Text) -> str | None:
    """Return the kind of tokenizer that settings ask for; None for token files without one."""
    if isinstance(settings.tokenizer, Path):
        return "file"
    return settings.tokenizer or (None if settings.reads_tokens else "char")


def read_kept(folder: Path, settings: Text) -> Kept | None:
    """Return the tokenizer of a run; None if its folder holds none.

    Raises ``DataError`` if the settings ask for another one, and ``StorageError`` if the file is
    not what was written.
    """
    path = folder / NAME
    try:
        kept = _parse(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} is not a run's tokenizer ({error}): put back what it was, or start a new run"
        ) from None
    _check_kind(kept, settings, path)
    _check_size(kept, settings, path)
    return kept


def write_kept(folder: Path, kept: Kept) -> None:
    """Write the tokenizer of a run into its folder, whole or not at all, if there is none yet."""
    path = folder / NAME
    facts = {"kind": kept.kind, "vocab_size": kept.vocab_size, "content": _content(kept.vocabulary)}
    try:
        if not path.exists():
            write_whole(path, json.dumps(facts, ensure_ascii=False), folder / f".{NAME}")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error


def _content(vocabulary: Vocabulary) -> Any:
    if isinstance(vocabulary, Characters):
        return vocabulary.alphabet
    return json.loads(vocabulary.to_json()) if isinstance(vocabulary, Pairs) else None


def _parse(text: bytes) -> Kept:
    facts = json.loads(text)
    kind, size, content = facts["kind"], facts["vocab_size"], facts["content"]
    match kind:
        case "char" if isinstance(content, str) and len(set(content)) == len(content):
            vocabulary: Vocabulary = Characters(content)
        case "byte" if content is None:
            vocabulary = Bytes()
        case "bpe" | "file":
            vocabulary = parse_pairs(json.dumps(content))
        case _:
            raise ValueError(f"its kind is {kind!r}, which its content does not fit")
    if type(size) is not int or size < vocabulary.vocab_size:
        raise ValueError(f"its vocab_size is {size!r}, for {vocabulary.vocab_size} tokens")
    return Kept(kind, vocabulary, size)


def _check_kind(kept: Kept, settings: Text, path: Path) -> None:
    named, kind = settings.tokenizer, kind_of(settings)
    if kind != kept.kind:
        raise DataError(
            f"text.tokenizer: the settings ask for {_said(kind)}, but this run was begun with "
            f"{_said(kept.kind)} ({path}): set it back, or start a new run"
        )
    # The run has its own copy: that the file is gone does no harm, but another one is a mistake.
    if not (isinstance(named, Path) and named.exists()):
        return
    if load_pairs(named).identity != kept.vocabulary.identity:
        raise DataError(
            f"text.tokenizer: {named} is not the tokenizer that this run was begun with "
            f"({path}): put that one back, or start a new run"
        )


def _said(kind: str | None) -> str:
    return {None: "none", "file": "the tokenizer of a file"}.get(kind, f'"{kind}"')


def _check_size(kept: Kept, settings: Text, path: Path) -> None:
    own, wanted = kept.vocabulary.vocab_size, settings.vocab_size
    if (own if wanted is None else wanted) != kept.vocab_size:
        now = "not set" if wanted is None else str(wanted)
        raise DataError(
            f"text.vocab_size is {now}, but this run was begun with a vocabulary of "
            f"{kept.vocab_size} ({path}): set it to {kept.vocab_size}, or start a new run"
        )
