"""Split text into chunks of bounded size, at places that depend on the text alone."""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING

from fundamentallm import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fundamentallm_text.files import FileRange

BLOCK = 1 << 20
"""Bytes of a file that are read at once."""
AT_LEAST = 1 << 16
AT_MOST = 1 << 20
NEWLINE_IN_TEXT = re.compile(r"(?<=\S)\n(?=\S)")


def chunks(text: Iterable[FileRange], separator: str, errors: str) -> Iterator[str]:
    """Yield the text as chunks that are tokenized separately; see ``split_text``.

    ``separator`` is a chunk of its own after every end of a file. ``errors`` is ``"strict"`` or
    ``"surrogateescape"``. Raises ``DataError`` with the file and the offset of the first byte that
    is not UTF-8.
    """
    for part in text:
        yield from split_text(decode_file(part, errors))
        if separator and part.ends:
            yield separator


def split_text(
    blocks: Iterable[str], at_least: int = AT_LEAST, at_most: int = AT_MOST
) -> Iterator[str]:
    """Split text into chunks of ``at_least`` to ``at_most`` characters; the last may be shorter.

    A chunk ends after the first newline, at least ``at_least`` characters in, that stands between
    two characters that are not white space. No token of a byte-level BPE crosses such a place, so
    the tokens of the chunks are the tokens of the whole text. Text without such a newline is split
    after the last newline, or else after ``at_most`` characters.
    """
    rest = ""
    for block in blocks:
        rest += block
        begin = 0
        # One character more than fits shows whether a newline at the very end is such a place.
        while len(rest) - begin > at_most:
            end = _chunk_end(rest, begin, at_least, at_most)
            yield rest[begin:end]
            begin = end
        rest = rest[begin:]
    begin = 0
    while begin < len(rest):
        end = _chunk_end(rest, begin, at_least, at_most)
        yield rest[begin:end]
        begin = end


def _chunk_end(text: str, begin: int, at_least: int, at_most: int) -> int:
    limit = begin + at_most
    found = NEWLINE_IN_TEXT.search(text, begin + at_least - 1, limit + 1)
    if found:
        return found.end()
    if len(text) <= limit:
        return len(text)
    newline = text.rfind("\n", begin + at_least - 1, limit)
    return newline + 1 if newline >= 0 else limit


def decode_file(part: FileRange, errors: str = "strict", block: int = BLOCK) -> Iterator[str]:
    """Yield the text of a file range, read ``block`` bytes at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    read = 0
    for data in _blocks(part, block):
        read += len(data)
        try:
            yield decoder.decode(data, final=read == part.size)
        except UnicodeDecodeError as error:
            # Its object also contains the incomplete character at the end of the last block.
            offset = part.start + read - len(error.object) + error.start
            raise DataError(_not_utf8(part, offset, error)) from None


def _blocks(part: FileRange, size: int) -> Iterator[bytes]:
    try:
        with part.path.open("rb") as file:
            file.seek(part.start)
            left = part.size
            while left:
                data = file.read(min(size, left))
                if not data:
                    raise DataError(f"{part.path} became shorter while it was read")
                left -= len(data)
                yield data
    except OSError as error:
        raise DataError(f"{part.path} cannot be read: {error.strerror}") from error


def _not_utf8(part: FileRange, offset: int, error: UnicodeDecodeError) -> str:
    return (
        f"{part.path}: byte {offset} (0x{error.object[error.start]:02x}) is not UTF-8 text; "
        'convert the file, or train on its bytes with tokenizer = "byte"'
    )


def group_chunks(parts: Iterable[str], size: int = BLOCK) -> Iterator[list[str]]:
    """Yield lists of chunks of about ``size`` characters together, which are in memory at once."""
    group: list[str] = []
    length = 0
    for part in parts:
        group.append(part)
        length += len(part)
        if length >= size:
            yield group
            group, length = [], 0
    if group:
        yield group
