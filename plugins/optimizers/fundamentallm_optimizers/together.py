"""Several optimizers of PyTorch that a run takes for one."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Together(Optimizer):
    """Optimizers of different parameters that step one after the other.

    ``param_groups`` are the very groups of all the parts, in their order, and ``state`` is one
    mapping that all of them share: whoever changes a group or loads a state changes the parts'.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let every part update its parameters; a closure is called once, before all of them."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse groups that come later: it would not be clear whose they are."""
        if "parts" in vars(self):
            raise TypeError("add the group to one of the optimizers in .parts before they join")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # which load_state_dict calls, too, with new groups
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            own = list(islice(groups, len(part.param_groups)))
            part.__setstate__({"state": self.state, "param_groups": own})
