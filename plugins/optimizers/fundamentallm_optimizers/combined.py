"""Several PyTorch optimizers as one."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class CombinedOptimizer(Optimizer):
    """Optimizers of different parameters that step one after the other.

    ``param_groups`` are the group dicts of all parts, in their order, and ``state`` is one mapping
    that all parts share. Changing a group or loading a state here changes it in the part.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters of every part; a closure is called once, before all of them."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise ``TypeError``: it would be unclear which part a later group belongs to."""
        if "parts" in vars(self):
            raise TypeError("add the group to one of the optimizers before they are combined")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # load_state_dict calls this too, with new group dicts
        self._share()

    def _share(self) -> None:
        """Give the parts the groups and the state of this optimizer, as the same objects."""
        groups = iter(self.param_groups)
        for part in self.parts:
            own = list(islice(groups, len(part.param_groups)))
            part.__setstate__({"state": self.state, "param_groups": own})
