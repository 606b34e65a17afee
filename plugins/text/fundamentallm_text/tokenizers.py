"""Tokenizers: by character, by byte, and those of the ``tokenizers`` library."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from fundamentallm import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

CODE_POINTS = 0x110000
NO_ID = 0xFFFFFFFF
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
BPE_SAMPLE = 1 << 28
"""The most characters that a BPE is learned from."""
# Usual names of the token that ends a text, in files that do not say which one it is.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")


class TextTokenizer(Protocol):
    """A ``Tokenizer`` of the core, with what reading a corpus needs."""

    errors: ClassVar[str]
    """How text that is not UTF-8 is decoded: ``"strict"`` or ``"surrogateescape"``."""
    eos_id: int | None
    """The id that ends a text: that of the separator, if it is one token."""

    @property
    def vocab_size(self) -> int:
        """The number of ids that text can be encoded to."""
        ...

    @property
    def identity(self) -> str:
        """Changes exactly if text would be encoded to other ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ...

    def decode(self, tokens: list[int]) -> str:
        """Return the text of ids; an id without a meaning becomes nothing or U+FFFD."""
        ...

    def encode_chunks(self, chunks: Sequence[str]) -> NDArray[np.generic]:
        """Return the ids of chunks of text, joined, (tokens,); each chunk is encoded separately."""
        ...

    def to_json(self) -> str:
        """Return the text of a ``tokenizer.json`` for the ``tokenizers`` library."""
        ...


class UnknownCharacterError(DataError):
    """Text has a character that is not in the alphabet."""

    def __init__(self, character: str, alphabet: str) -> None:
        self.character = character
        super().__init__(
            f"{character!r} is none of the {len(alphabet)} characters of the training text: "
            + alphabet[:200]
        )


class CharTokenizer:
    """One token for each character of an alphabet; the id is the index in it."""

    errors: ClassVar[str] = "strict"

    def __init__(self, alphabet: str, separator: str = "") -> None:
        self.alphabet = alphabet
        self.vocab_size = len(alphabet)
        self.identity = "char:" + hashlib.sha256(alphabet.encode()).hexdigest()
        self._ids = {character: index for index, character in enumerate(alphabet)}
        self.eos_id = self._ids.get(separator)

    @cached_property
    def _table(self) -> NDArray[np.uint32]:
        table = np.full(CODE_POINTS, NO_ID, dtype=np.uint32)
        table[_code_points(self.alphabet)] = np.arange(self.vocab_size)
        return table

    def encode(self, text: str) -> list[int]:
        """Return one id per character; raise ``UnknownCharacterError`` for any other character."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as error:
            raise UnknownCharacterError(error.args[0], self.alphabet) from None

    def decode(self, tokens: list[int]) -> str:
        """Return the characters of ids."""
        return "".join(self.alphabet[t] if t < self.vocab_size else UNKNOWN for t in tokens)

    def encode_chunks(self, chunks: Sequence[str]) -> NDArray[np.generic]:
        """Return the ids of chunks, joined; raise ``UnknownCharacterError`` like ``encode``."""
        points = _code_points("".join(chunks))
        found: NDArray[np.uint32] = self._table[points]
        unknown = found == NO_ID
        if unknown.any():
            raise UnknownCharacterError(chr(points[unknown.argmax()]), self.alphabet)
        return found

    def to_json(self) -> str:
        """Return a ``tokenizer.json`` with one word for each character."""
        made = tokenizers.Tokenizer(models.WordLevel(self._ids))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
        return str(made.to_str())


class ByteTokenizer:
    """One token for each byte of the text in UTF-8; the id is the byte."""

    errors: ClassVar[str] = "surrogateescape"
    vocab_size: ClassVar[int] = 256
    identity: ClassVar[str] = "byte"

    def __init__(self, separator: str = "") -> None:
        ids = self.encode(separator)
        self.eos_id = ids[0] if len(ids) == 1 else None

    def encode(self, text: str) -> list[int]:
        """Return the bytes of the text."""
        return list(text.encode("utf-8", self.errors))

    def decode(self, tokens: list[int]) -> str:
        """Return the text of bytes; bytes that are not UTF-8 become U+FFFD."""
        return bytes(token for token in tokens if token < self.vocab_size).decode(errors="replace")

    def encode_chunks(self, chunks: Sequence[str]) -> NDArray[np.generic]:
        """Return the bytes of chunks, joined."""
        return np.frombuffer("".join(chunks).encode("utf-8", self.errors), dtype=np.uint8)

    def to_json(self) -> str:
        """Return a ``tokenizer.json`` of a byte-level BPE without merges."""
        made = tokenizers.Tokenizer(models.BPE({s: byte for byte, s in _byte_symbols()}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        return str(made.to_str())


class LibraryTokenizer:
    """A tokenizer of the ``tokenizers`` library, such as byte-pair encoding."""

    errors: ClassVar[str] = "strict"

    def __init__(self, text: str, separator: str = "") -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # A file may set a maximal length, which would silently truncate text.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # From the file, and not what this version of the library would write for it.
        facts = json.loads(text) | {"truncation": None, "padding": None}
        self._json = json.dumps(facts, sort_keys=True, ensure_ascii=False)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.identity = "pairs:" + hashlib.sha256(self._json.encode()).hexdigest()
        self.eos_id = self._find_eos(separator)

    def _find_eos(self, separator: str) -> int | None:
        if separator:
            ids = self.encode(separator)
            return ids[0] if len(ids) == 1 else None
        found = map(self._tokenizer.token_to_id, END_TOKENS)
        return next((index for index in found if index is not None), None)

    def to_json(self) -> str:
        """Return the text of its ``tokenizer.json``."""
        return self._json

    def encode(self, text: str) -> list[int]:
        """Return the ids; special tokens in the text are recognized, and none is added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: list[int]) -> str:
        """Return the text, special tokens included."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def encode_chunks(self, chunks: Sequence[str]) -> NDArray[np.generic]:
        """Return the ids of chunks, each encoded separately, on all cores."""
        found = self._tokenizer.encode_batch_fast(list(chunks), add_special_tokens=False)
        return np.concatenate([np.array(encoding.ids, dtype=np.uint32) for encoding in found])


def collect_alphabet(text: Iterable[str]) -> str:
    """Return every character of the text once, in the order of code points."""
    seen = np.zeros(CODE_POINTS, dtype=np.bool_)
    for part in text:
        seen[_code_points(part)] = True
    return "".join(map(chr, np.flatnonzero(seen)))


def learn_bpe(text: Iterable[str], size: int, vocab_size: int, separator: str) -> LibraryTokenizer:
    """Learn a byte-level BPE like GPT-2's from ``size`` characters of text.

    Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016,
    arXiv:1508.07909); bytes: Radford et al., "Language Models are Unsupervised Multitask Learners"
    (2019), section 2.2. The first ids are the separator, if there is one, and the 256 bytes, so
    every text can be encoded. To bound memory, text of more than 256 Mi characters is sampled: only
    every second, third… chunk is used.
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
    return LibraryTokenizer(tokenizer.to_str(), separator)


def _sampled(text: Iterable[str], every: int) -> Iterator[str]:
    return islice(iter(text), 0, None, max(every, 1))


def load_tokenizer(path: Path, separator: str = "") -> LibraryTokenizer:
    """Read a ``tokenizer.json``, of the library or of a run; ``DataError`` if it is not one."""
    if not path.is_file():
        raise DataError(f"text.tokenizer: there is no file {path}")
    try:
        text = path.read_text(encoding="utf-8")
        facts = json.loads(text)
        if isinstance(facts, dict) and "content" in facts:  # the format of a run folder
            text = json.dumps(facts["content"])
        return parse_tokenizer(text, separator)
    except ValueError as error:
        raise DataError(f"text.tokenizer: {path} is not a tokenizer.json: {error}") from None


def parse_tokenizer(text: str, separator: str = "") -> LibraryTokenizer:
    """Return the tokenizer of the text of a ``tokenizer.json``; ``ValueError`` if it is not one."""
    try:
        return LibraryTokenizer(text, separator)
    except Exception as error:  # noqa: BLE001 - the library raises nothing more specific
        raise ValueError(str(error)) from None


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def _byte_symbols() -> Iterator[tuple[int, str]]:
    """Yield each byte with the character that stands for it in a byte-level BPE (GPT-2's code).

    Printable characters of Latin-1 stand for themselves, the other bytes for U+0100 and later.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = 0x100
    for byte in range(256):
        if byte in printable:
            yield byte, chr(byte)
        else:
            yield byte, chr(other)
            other += 1
