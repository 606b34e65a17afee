"""Count the reads of device values that make the host wait."""

from __future__ import annotations

from collections import Counter
from typing import Any, Self

WAITING_OPERATIONS = (
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::is_nonzero",
    "aten::item",
)
"""Operations that make the host wait. Every Python call that reads a number (``item``, ``float``,
``bool``, ``int``, ``format``) runs the first one. The others need numbers to know their result."""
WAITING_CALLS = ("tolist", "numpy", "cpu", "__array__")
"""Calls that read memory without any operation where the memory is the host's, as in a test."""


class HostReads:
    """Counts the reads that make the host wait for the device, between ``start`` and ``stop``.

    ``with HostReads() as reads`` counts in a block. On a CPU, where nothing waits, it counts the
    same reads. ``found`` has the number of reads by operation, ``count`` their sum.
    """

    def __init__(self) -> None:
        from torch.overrides import TorchFunctionMode

        # torch has no public name for it. Its documentation describes it under this one, and
        # torch.profiler, which is public, also lists the operations that other operations call.
        from torch.utils._python_dispatch import TorchDispatchMode

        self.found: Counter[str] = Counter()
        found = self.found

        class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                name = func.name().partition(".")[0]
                found.update([name] if name in WAITING_OPERATIONS else [])
                return func(*args, **(kwargs or {}))

        class Calls(TorchFunctionMode):
            def __torch_function__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                name = getattr(func, "__name__", "")
                found.update([name] if name in WAITING_CALLS else [])
                return func(*args, **(kwargs or {}))

        self._modes: list[Any] = [Operations(), Calls()]  # type: ignore[no-untyped-call]

    @property
    def count(self) -> int:
        return self.found.total()

    def start(self) -> None:
        """Begin to count."""
        for mode in self._modes:
            mode.__enter__()

    def stop(self) -> None:
        """End the count."""
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
