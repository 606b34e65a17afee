"""Read existing token files: ``.npy``, and ``.bin`` with ids and nothing else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fundamentallm import DataError
from fundamentallm_text.files import find
from fundamentallm_text.splits import (
    MAIN_SPLIT,
    CorpusReader,
    Split,
    Splits,
    cache_key,
    find_held_out,
    padded_vocab_size,
)
from fundamentallm_text.token_cache import map_tokens
from fundamentallm_text.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from fundamentallm_text.token_cache import Tokens

BLOCK = 1 << 22
DTYPES = ("uint8", "uint16", "uint32", "int16", "int32", "int64")


class TokenReader(CorpusReader):
    """Reads the token files that the settings name.

    A single file is memory-mapped in place; several are joined once, in the cache.
    """

    def read(self) -> Splits:
        """Return the tokens of every split."""
        settings = self.settings
        named = settings.tokenizer
        tokenizer = self.tokenizer or (load_tokenizer(named) if isinstance(named, Path) else None)
        own_size = tokenizer.vocab_size if tokenizer else 0
        vocab_size = padded_vocab_size(own_size, settings.vocab_size)
        paths = find(settings.path or [], "text.path")
        train = self._open(paths, vocab_size)
        found = find_held_out(settings, paths)
        held_out = {name: self._open(others, vocab_size) for name, others in found.items()}
        if settings.validation_path is None:
            end, count = settings.validation_fraction, len(train.tokens)
            middle = int(count * (1 - end))
            held_out = ({MAIN_SPLIT: _part(train, middle, count)} if end else {}) | held_out
            train = _part(train, 0, middle)
        return Splits(train, held_out, tokenizer, vocab_size)

    def _open(self, paths: list[Path], vocab_size: int) -> Split:
        dtype = self.settings.dtype
        arrays = [open_tokens(path, dtype) for path in paths]
        digests = [self.cache.digest(path) for path in paths]
        for path, tokens, digest in zip(paths, arrays, digests, strict=True):
            key = cache_key("range", digest, tokens.dtype.str, vocab_size)
            self.cache.text(key, partial(self._check, path, tokens, vocab_size))
        if len(arrays) == 1:
            return Split(arrays[0], cache_key("file", digests[0], arrays[0].dtype.str))
        wide = "uint16" if vocab_size <= 1 << 16 else "uint32"
        key = cache_key("joined", digests, [tokens.dtype.str for tokens in arrays], wide)
        stored = self.cache.tokens(key, wide, lambda: self._joined(arrays))
        return Split(stored.tokens, stored.digest)

    def _check(self, path: Path, tokens: Tokens, vocab_size: int) -> str:
        for begin in range(0, len(tokens), BLOCK):
            check_token_ids(tokens, begin, vocab_size, path)
            self.report("checking tokens", min(begin + BLOCK, len(tokens)), len(tokens))
        return "sound"

    def _joined(self, arrays: list[Tokens]) -> Any:
        done, total = 0, sum(map(len, arrays))
        for tokens in arrays:
            for begin in range(0, len(tokens), BLOCK):
                block = tokens[begin : begin + BLOCK]
                yield block
                done += len(block)
                self.report("joining tokens", done, total)


def open_tokens(path: Path, dtype: str) -> Tokens:
    """Return the tokens of a file as a memory map, (tokens,); ``dtype`` is that of a ``.bin``.

    Raises ``DataError`` for a file that is not a one-dimensional array of little-endian ids.
    """
    if path.suffix == ".npy":
        return _open_npy(path)
    size, item = path.stat().st_size, np.dtype(dtype).newbyteorder("<")
    if size % item.itemsize:
        raise DataError(
            f"{path}: {size} bytes are not a whole number of {dtype} tokens; "
            "set text.dtype to the type of its tokens"
        )
    return map_tokens(path, item, 0, size // item.itemsize)


def _open_npy(path: Path) -> Tokens:
    try:
        found: Tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a .npy file of numbers: {error}") from None
    if found.dtype.name not in DTYPES or found.dtype.byteorder == ">":
        raise DataError(f"{path}: its type is {found.dtype.str}, not one of {', '.join(DTYPES)}")
    if found.ndim != 1:
        raise DataError(f"{path}: its shape is {found.shape}, but tokens need one dimension")
    return found.view(np.ndarray)


def check_token_ids(tokens: Tokens, begin: int, vocab_size: int, path: Path) -> None:
    """Raise ``DataError`` for the first id of a block that is not in 0 … ``vocab_size - 1``."""
    block = tokens[begin : begin + BLOCK]
    if block.max() >= vocab_size or block.min() < 0:
        index = begin + int(np.argmax((block < 0) | (block >= vocab_size)))
        raise DataError(
            f"{path}: token {index} is {tokens[index]}, outside a vocabulary of {vocab_size}; "
            "check text.vocab_size, the number of ids, and text.dtype, their type in the file"
        )


def _part(split: Split, start: int, stop: int) -> Split:
    return Split(split.tokens[start:stop], f"{split.digest}[{start}:{stop}]")
