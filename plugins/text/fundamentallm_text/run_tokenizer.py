"""Store the tokenizer of a run in its folder, and continue the run with it.

``tokenizer.json`` in the run folder is an object with three keys:

- ``"kind"``: ``"char"``, ``"byte"``, ``"bpe"``, or ``"file"`` if the settings named a file;
- ``"vocab_size"``: the number of ids that the run's model has;
- ``"content"``: for ``"char"`` the alphabet as one string, where the id of a character is its
  index; for ``"byte"`` ``null``; otherwise the tokenizer.json of the ``tokenizers`` library. That
  library accepts no additional keys, so ``kind`` and ``vocab_size`` cannot be inside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm import DataError, StorageError, write_durably
from fundamentallm_text.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    LibraryTokenizer,
    load_tokenizer,
    parse_tokenizer,
)

if TYPE_CHECKING:
    from fundamentallm_text import Text
    from fundamentallm_text.tokenizers import TextTokenizer

NAME = "tokenizer.json"


@dataclass(frozen=True)
class RunTokenizer:
    """A tokenizer, the kind of setting that it comes from, and the ids that the model has."""

    kind: str
    tokenizer: TextTokenizer
    vocab_size: int


def tokenizer_kind(settings: Text) -> str | None:
    """Return the kind of tokenizer that the settings ask for; None for token files without one."""
    if isinstance(settings.tokenizer, Path):
        return "file"
    return settings.tokenizer or (None if settings.reads_tokens else "char")


def read_run_tokenizer(folder: Path, settings: Text) -> RunTokenizer | None:
    """Return the tokenizer of a run; None if its folder has none.

    Raises ``DataError`` if the settings ask for a different one, and ``StorageError`` if the file
    is damaged.
    """
    path = folder / NAME
    try:
        found = _parse(path.read_bytes(), settings.separator)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path} is not the tokenizer of a run ({error}): restore the file, or start a new run"
        ) from None
    _check_kind(found, settings, path)
    _check_size(found, settings, path)
    return found


def write_run_tokenizer(folder: Path, content: RunTokenizer) -> None:
    """Write the tokenizer of a run durably into its folder, if there is none yet."""
    path = folder / NAME
    if path.exists():
        return
    facts = {
        "kind": content.kind,
        "vocab_size": content.vocab_size,
        "content": _content(content.tokenizer),
    }
    write_durably(path, json.dumps(facts, ensure_ascii=False))


def _content(tokenizer: TextTokenizer) -> Any:
    if isinstance(tokenizer, CharTokenizer):
        return tokenizer.alphabet
    return json.loads(tokenizer.to_json()) if isinstance(tokenizer, LibraryTokenizer) else None


def _parse(text: bytes, separator: str) -> RunTokenizer:
    facts = json.loads(text)
    kind, size, content = facts["kind"], facts["vocab_size"], facts["content"]
    match kind:
        case "char" if isinstance(content, str) and len(set(content)) == len(content):
            tokenizer: TextTokenizer = CharTokenizer(content, separator)
        case "byte" if content is None:
            tokenizer = ByteTokenizer(separator)
        case "bpe" | "file":
            tokenizer = parse_tokenizer(json.dumps(content), separator)
        case _:
            raise ValueError(f"its kind is {kind!r}, which its content does not fit")
    if type(size) is not int or size < tokenizer.vocab_size:
        raise ValueError(f"its vocab_size is {size!r}, for {tokenizer.vocab_size} tokens")
    return RunTokenizer(kind, tokenizer, size)


def _check_kind(found: RunTokenizer, settings: Text, path: Path) -> None:
    named, kind = settings.tokenizer, tokenizer_kind(settings)
    if kind != found.kind:
        raise DataError(
            f"text.tokenizer: the settings ask for {_quoted(kind)}, but this run was started with "
            f"{_quoted(found.kind)} ({path}): set it back, or start a new run"
        )
    # The run has its own copy: a missing file is no problem, but a different one is a mistake.
    if not (isinstance(named, Path) and named.exists()):
        return
    if load_tokenizer(named).identity != found.tokenizer.identity:
        raise DataError(
            f"text.tokenizer: {named} is not the tokenizer that this run was started with "
            f"({path}): restore that file, or start a new run"
        )


def _quoted(kind: str | None) -> str:
    return {None: "none", "file": "the tokenizer of a file"}.get(kind, f'"{kind}"')


def _check_size(found: RunTokenizer, settings: Text, path: Path) -> None:
    own, wanted = found.tokenizer.vocab_size, settings.vocab_size
    if (own if wanted is None else wanted) != found.vocab_size:
        now = "not set" if wanted is None else str(wanted)
        raise DataError(
            f"text.vocab_size is {now}, but this run was started with a vocabulary of "
            f"{found.vocab_size} ({path}): set it to {found.vocab_size}, or start a new run"
        )
