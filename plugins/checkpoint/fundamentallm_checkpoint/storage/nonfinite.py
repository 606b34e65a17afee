"""Find NaN and infinity in the bytes of numbers, by integer arithmetic, for every dtype.

Torch cannot do this here: some of its operations do not support 8-bit floats, and all of them
would start threads that compete with the training. numpy releases the interpreter's lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK = 2**18  # numbers; the scratch memory stays small


@attrs.frozen
class BitPattern:
    """How a float dtype encodes values that are not finite.

    A value is not finite if all bits of ``special`` are set in it and none of ``clear``. It is an
    infinity if the bits of ``fraction`` are clear as well, else NaN.
    """

    word: type[np.unsignedinteger[Any]]
    special: int
    fraction: int
    clear: int = 0


_DOUBLE = BitPattern(np.uint64, 0x7FF0_0000_0000_0000, 0x000F_FFFF_FFFF_FFFF)
_SINGLE = BitPattern(np.uint32, 0x7F80_0000, 0x007F_FFFF)
# The "fn" dtypes have no infinity; the "uz" ones encode their only NaN as minus zero.
_PATTERNS = {
    torch.float64: _DOUBLE,
    torch.float32: _SINGLE,
    torch.complex64: _SINGLE,
    torch.float16: BitPattern(np.uint16, 0x7C00, 0x03FF),
    torch.bfloat16: BitPattern(np.uint16, 0x7F80, 0x007F),
    torch.float8_e5m2: BitPattern(np.uint8, 0x7C, 0x03),
    torch.float8_e4m3fn: BitPattern(np.uint8, 0x7F, 0x7F),
    torch.float8_e4m3fnuz: BitPattern(np.uint8, 0x80, 0x80, clear=0x7F),
    torch.float8_e5m2fnuz: BitPattern(np.uint8, 0x80, 0x80, clear=0x7F),
}


def holds_nonfinite(data: NDArray[np.uint8], dtype: torch.dtype, *, infinite: bool = True) -> bool:
    """Return whether the bytes of numbers hold NaN, or, if ``infinite`` counts, an infinity."""
    pattern = _PATTERNS.get(dtype)
    if pattern is None:  # integers and bool
        return False
    words = data.view(pattern.word)
    special = pattern.word(pattern.special)
    mask = pattern.word(pattern.special | pattern.clear)
    scratch = np.empty(min(len(words), _CHUNK), pattern.word)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        masked = np.bitwise_and(part, mask, out=scratch[: len(part)])
        # Without ``clear`` no masked value is larger than ``special``, and a maximum is fastest.
        hit = bool((masked == special).any() if pattern.clear else masked.max() == special)
        if hit and (infinite or _holds_nan(part, pattern)):
            return True
    return False


def _holds_nan(part: NDArray[Any], pattern: BitPattern) -> bool:
    masked = part & pattern.word(pattern.special | pattern.clear)
    chosen = part[masked == pattern.word(pattern.special)]
    return bool((chosen & pattern.word(pattern.fraction)).any())
