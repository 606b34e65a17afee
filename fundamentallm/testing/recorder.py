"""Record what a run did: hook calls, one step's snapshot, weights, reads of device values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from fundamentallm import HOOKS, Hooks, Rejection, Run, Snapshot, field, hookimpl, plugin

if TYPE_CHECKING:
    from torch import Tensor


class Recorder:
    """Records the hook calls of a run that follow ``on_run_start``: pass it as ``trace``.

    ``names`` are the hooks in the order of their calls; ``calls`` pairs them with arguments.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, hooks: Hooks) -> Hooks:
        bound = {name: self._recorded(name, getattr(hooks, name)) for name in HOOKS}
        return cast("Hooks", SimpleNamespace(**bound))

    def _recorded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def record(**given: Any) -> Any:
            self.calls.append((name, {k: v for k, v in given.items() if k != "run"}))
            return call(**given)

        return record

    @property
    def names(self) -> list[str]:
        return [hook for hook, _ in self.calls]


@plugin
class Memory:
    """Keeps the snapshot of one step as a checkpoint would, and passes it to a run that continues.

    Listed in a run and then, the same object, in another, it makes the other go on from that step.
    """

    step: int = 0
    """The step whose snapshot is kept."""
    later: int | None = None
    """The step in which the run goes back to the one that is kept, once."""
    kept: Snapshot | None = field(init=False, default=None, metadata={"lasting": True})
    gone_back: bool = field(init=False, default=False, metadata={"lasting": True})

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if run.progress.step == self.step:
            self.kept = copy.deepcopy(run.snapshot())

    @hookimpl
    def read_checkpoint(self) -> Snapshot | None:
        return copy.deepcopy(self.kept)

    @hookimpl
    def judge_step(self, run: Run) -> Rejection | None:
        if self.gone_back or run.progress.step + 1 != self.later:
            return None
        self.gone_back = True
        run.rewind("latest")
        return Rejection("other", "go back")


def weights(run: Run) -> dict[str, Tensor]:
    """Return copies of a run's weights on the CPU, to compare bit by bit."""
    return {name: tensor.detach().cpu().clone() for name, tensor in run.model.state_dict().items()}


def assert_same_weights(one: Run, other: Run) -> None:
    """Fail unless two runs ended with bitwise equal weights."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not bool(mine[name].equal(theirs[name]))]
    assert not different, f"these weights differ: {', '.join(different)}"
