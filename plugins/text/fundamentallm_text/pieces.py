"""Text in pieces of a bounded size, cut by what it says and not by how it is read."""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING

from fundamentallm import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fundamentallm_text.files import Extent

BLOCK = 1 << 20
AT_LEAST = 1 << 16
AT_MOST = 1 << 20
SEAM = re.compile(r"(?<=\S)\n(?=\S)")


def pieces(text: Iterable[Extent], separator: str, errors: str) -> Iterator[str]:
    """Yield the text as the pieces that are tokenized each on its own; see ``cut_text``.

    ``separator`` is a piece of its own after every end of a file. ``errors`` is ``"strict"`` or
    ``"surrogateescape"``; ``DataError`` names the file and the place of the first byte that is not
    UTF-8.
    """
    for extent in text:
        yield from cut_text(decoded(extent, errors))
        if separator and extent.ends:
            yield separator


def cut_text(
    blocks: Iterable[str], at_least: int = AT_LEAST, at_most: int = AT_MOST
) -> Iterator[str]:
    """Cut text into pieces of ``at_least`` to ``at_most`` characters (the last may be shorter).

    A piece ends after the first newline, ``at_least`` characters in, that stands between two
    characters that are not white space: no token of a byte-level BPE reaches across such a place,
    so the tokens of the pieces are those of the text as a whole. Text without one is cut after the
    last newline there is, or else after ``at_most`` characters.
    """
    rest = ""
    for block in blocks:
        rest += block
        begin = 0
        # One character more than fits tells whether a newline at the very end is such a place.
        while len(rest) - begin > at_most:
            end = _end_of_piece(rest, begin, at_least, at_most)
            yield rest[begin:end]
            begin = end
        rest = rest[begin:]
    begin = 0
    while begin < len(rest):
        end = _end_of_piece(rest, begin, at_least, at_most)
        yield rest[begin:end]
        begin = end


def _end_of_piece(text: str, begin: int, at_least: int, at_most: int) -> int:
    limit = begin + at_most
    seam = SEAM.search(text, begin + at_least - 1, limit + 1)
    if seam:
        return seam.end()
    if len(text) <= limit:
        return len(text)
    newline = text.rfind("\n", begin + at_least - 1, limit)
    return newline + 1 if newline >= 0 else limit


def decoded(extent: Extent, errors: str = "strict", block: int = BLOCK) -> Iterator[str]:
    """Yield the text of an extent, read ``block`` bytes at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    read = 0
    for data in _blocks(extent, block):
        read += len(data)
        try:
            yield decoder.decode(data, final=read == extent.size)
        except UnicodeDecodeError as error:
            # Its object also holds what was kept back of the block before.
            place = extent.start + read - len(error.object) + error.start
            raise DataError(_not_text(extent, place, error)) from None


def _blocks(extent: Extent, size: int) -> Iterator[bytes]:
    try:
        with extent.path.open("rb") as file:
            file.seek(extent.start)
            left = extent.size
            while left:
                data = file.read(min(size, left))
                if not data:
                    raise DataError(f"{extent.path} became shorter while it was read")
                left -= len(data)
                yield data
    except OSError as error:
        raise DataError(f"{extent.path} cannot be read: {error.strerror}") from error


def _not_text(extent: Extent, place: int, error: UnicodeDecodeError) -> str:
    return (
        f"{extent.path}: byte {place} (0x{error.object[error.start]:02x}) is not UTF-8 text; "
        'convert the file, or train on its bytes with tokenizer = "byte"'
    )


def grouped(parts: Iterable[str], size: int = BLOCK) -> Iterator[list[str]]:
    """Yield lists of pieces of about ``size`` characters together: what is held at one time."""
    group: list[str] = []
    held = 0
    for part in parts:
        group.append(part)
        held += len(part)
        if held >= size:
            yield group
            group, held = [], 0
    if group:
        yield group
