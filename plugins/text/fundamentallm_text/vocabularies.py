"""Text to token ids and back: by character, by byte, by pairs of bytes that occur often."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fundamentallm import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

CODE_POINTS = 0x110000
NO_ID = 0xFFFFFFFF
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
BPE_SAMPLE = 1 << 28


class Vocabulary(Protocol):
    """A tokenizer, and what the making of a corpus asks of it."""

    errors: ClassVar[str]
    """How text that is not UTF-8 is decoded: ``"strict"``, or ``"surrogateescape"``."""

    @property
    def vocab_size(self) -> int:
        """Ids that text can be turned into."""
        ...

    @property
    def identity(self) -> str:
        """Changes exactly if text would become other tokens."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens; ids that mean nothing become nothing or U+FFFD."""
        ...

    def encode_pieces(self, pieces: Sequence[str]) -> NDArray[np.generic]:
        """Return the tokens of pieces of text, joined; each piece is encoded on its own."""
        ...


class UnknownCharacterError(DataError):
    """Text has a character that the alphabet lacks."""

    def __init__(self, character: str, alphabet: str) -> None:
        self.character = character
        super().__init__(
            f"{character!r} is none of the {len(alphabet)} characters of the text that was "
            "trained on: " + alphabet[:200]
        )


class Characters:
    """One token for each character of an alphabet, in the order of code points."""

    errors: ClassVar[str] = "strict"

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet
        self.vocab_size = len(alphabet)
        self.identity = "char:" + hashlib.sha256(alphabet.encode()).hexdigest()
        self._ids = {character: index for index, character in enumerate(alphabet)}

    @cached_property
    def _table(self) -> NDArray[np.uint32]:
        table = np.full(CODE_POINTS, NO_ID, dtype=np.uint32)
        table[_code_points(self.alphabet)] = np.arange(self.vocab_size)
        return table

    def encode(self, text: str) -> list[int]:
        """Return one id per character; ``UnknownCharacterError`` if one is not of the alphabet."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise UnknownCharacterError(error.args[0], self.alphabet) from None

    def decode(self, tokens: list[int]) -> str:
        """Return the characters of ids."""
        return "".join(self.alphabet[t] if t < self.vocab_size else UNKNOWN for t in tokens)

    def encode_pieces(self, pieces: Sequence[str]) -> NDArray[np.generic]:
        """Return the ids of pieces, joined; ``UnknownCharacterError`` as ``encode``."""
        points = _code_points("".join(pieces))
        found: NDArray[np.uint32] = self._table[points]
        unknown = found == NO_ID
        if unknown.any():
            raise UnknownCharacterError(chr(points[unknown.argmax()]), self.alphabet)
        return found


class Bytes:
    """One token for each byte of the text in UTF-8."""

    errors: ClassVar[str] = "surrogateescape"
    vocab_size: ClassVar[int] = 256
    identity: ClassVar[str] = "byte"

    def encode(self, text: str) -> list[int]:
        """Return the bytes of the text."""
        return list(text.encode("utf-8", self.errors))

    def decode(self, tokens: list[int]) -> str:
        """Return the text of bytes; what is not UTF-8 becomes U+FFFD."""
        return bytes(token for token in tokens if token < self.vocab_size).decode(errors="replace")

    def encode_pieces(self, pieces: Sequence[str]) -> NDArray[np.generic]:
        """Return the bytes of pieces, joined."""
        return np.frombuffer("".join(pieces).encode("utf-8", self.errors), dtype=np.uint8)


class Pairs:
    """A tokenizer of the ``tokenizers`` library: byte-pair encoding, or whatever its file says."""

    errors: ClassVar[str] = "strict"

    def __init__(self, text: str) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # A file may ask for a maximal length: text would silently be cut short.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Of the file and not of what this version of the library would write in its place.
        facts = json.loads(text) | {"truncation": None, "padding": None}
        self._json = json.dumps(facts, sort_keys=True, ensure_ascii=False)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.identity = "pairs:" + hashlib.sha256(self._json.encode()).hexdigest()

    def to_json(self) -> str:
        """Return the text of its ``tokenizer.json``."""
        return self._json

    def encode(self, text: str) -> list[int]:
        """Return the tokens; special tokens are found where the text spells them, none is added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: list[int]) -> str:
        """Return the text, special tokens included."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def encode_pieces(self, pieces: Sequence[str]) -> NDArray[np.generic]:
        """Return the tokens of pieces, each encoded on its own, on all cores."""
        found = self._tokenizer.encode_batch_fast(list(pieces), add_special_tokens=False)
        return np.concatenate([np.array(encoding.ids, dtype=np.uint32) for encoding in found])


def collect_alphabet(text: Iterable[str]) -> str:
    """Return every character of the text once, in the order of code points."""
    seen = np.zeros(CODE_POINTS, dtype=np.bool_)
    for part in text:
        seen[_code_points(part)] = True
    return "".join(map(chr, np.flatnonzero(seen)))


def learn_pairs(text: Iterable[str], size: int, vocab_size: int, separator: str) -> Pairs:
    """Learn a byte-level BPE as GPT-2's from ``size`` characters of text, or a part spread evenly.

    The first ids are the separator, if there is one, and the 256 bytes, so any text has tokens.
    Of text beyond 256 Mi characters every second, third… piece is learned from: this bounds memory.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    recipe = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[separator] if separator else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sampled(text, -(-size // BPE_SAMPLE)), recipe)
    return Pairs(tokenizer.to_str())


def _sampled(text: Iterable[str], every: int) -> Iterator[str]:
    return islice(iter(text), 0, None, max(every, 1))


def load_pairs(path: Path) -> Pairs:
    """Read a ``tokenizer.json``, of the library or of a run; ``DataError`` if it is not one."""
    if not path.is_file():
        raise DataError(f"text.tokenizer: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        facts = json.loads(text)
        if isinstance(facts, dict) and "content" in facts:  # as a run keeps it
            text = json.dumps(facts["content"])
        return parse_pairs(text)
    except ValueError as error:
        raise DataError(f"text.tokenizer: {path} is not a tokenizer.json: {error}") from None


def parse_pairs(text: str) -> Pairs:
    """Make a tokenizer of the text of a ``tokenizer.json``; ``ValueError`` if it is not one."""
    try:
        return Pairs(text)
    except Exception as error:  # noqa: BLE001 - the library raises nothing more special
        raise ValueError(str(error)) from None


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
