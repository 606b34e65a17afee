"""NaN and infinity in the bits of numbers: found by whole-number arithmetic, for every kind.

Of torch's operations some know no eight-bit floats, and all would start threads of their own
beside those that train. What this does lets Python's other threads run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CHUNK = 2**18


@attrs.frozen
class Form:
    """How a kind of float writes what is no number.

    A value is not finite if all bits of ``special`` are set in it and none of ``clear``; it is an
    infinity if those of ``fraction`` are clear besides.
    """

    word: type[np.unsignedinteger[Any]]
    special: int
    fraction: int
    clear: int = 0


_DOUBLE = Form(np.uint64, 0x7FF0_0000_0000_0000, 0x000F_FFFF_FFFF_FFFF)
_SINGLE = Form(np.uint32, 0x7F80_0000, 0x007F_FFFF)
# The "fn" kinds have no infinity; "uz": minus zero is taken for the only NaN.
_FORMS = {
    torch.float64: _DOUBLE,
    torch.float32: _SINGLE,
    torch.complex64: _SINGLE,
    torch.float16: Form(np.uint16, 0x7C00, 0x03FF),
    torch.bfloat16: Form(np.uint16, 0x7F80, 0x007F),
    torch.float8_e5m2: Form(np.uint8, 0x7C, 0x03),
    torch.float8_e4m3fn: Form(np.uint8, 0x7F, 0x7F),
    torch.float8_e4m3fnuz: Form(np.uint8, 0x80, 0x80, clear=0x7F),
    torch.float8_e5m2fnuz: Form(np.uint8, 0x80, 0x80, clear=0x7F),
}


def found(data: NDArray[np.uint8], dtype: torch.dtype, *, infinite: bool = True) -> bool:
    """Tell whether the bytes of numbers hold NaN, or, where it counts, an infinity."""
    form = _FORMS.get(dtype)
    if form is None:
        return False
    words = data.view(form.word)
    special, clear = form.word(form.special), form.word(form.special | form.clear)
    scratch = np.empty(min(len(words), _CHUNK), form.word)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        masked = np.bitwise_and(part, clear, out=scratch[: len(part)])
        # Nothing is larger than all bits of the mask, and the largest is found fastest.
        odd = bool((masked == special).any() if form.clear else masked.max() == special)
        if odd and (infinite or _holds_nan(part, form)):
            return True
    return False


def _holds_nan(part: NDArray[Any], form: Form) -> bool:
    masked = part & form.word(form.special | form.clear)
    chosen = part[masked == form.word(form.special)]
    return bool((chosen & form.word(form.fraction)).any())
