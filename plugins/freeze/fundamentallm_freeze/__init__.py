"""Keep chosen parameters unchanged, for the whole run or for the first part of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from fundamentallm import Period, field, hookimpl, plugin

if TYPE_CHECKING:
    from fundamentallm import Run

__all__ = ["Freeze"]


@plugin
class Freeze:
    """Freeze parameters by name, and optionally unfreeze them during the run.

    The frozen parameters are a pure function of the run's progress: a resumed run, and a run that
    goes back to a checkpoint, freeze what the uninterrupted run does.
    """

    role = "training"
    # LoRA freezes everything but its adapters. This plugin comes later, and may freeze adapters.
    after: ClassVar[tuple[str, ...]] = ("lora",)

    patterns: list[str] = field()
    """Glob patterns on full parameter names (`*` also matches dots), such as `"embed.*"`: the
    parameters to freeze."""
    except_for: list[str] = field(factory=list)
    """Glob patterns on the names of parameters that are trained although one of `patterns` matches
    them."""
    unfreeze: dict[str, Period] = field(factory=dict)
    """Glob pattern to period: when frozen parameters begin to be trained, such as `"blocks.3.*" =
    "500 steps"`. If several patterns match a parameter, the earliest period counts."""
    eval_mode: bool = False
    """Whether modules whose parameters are all frozen stay in evaluation mode: without dropout, and
    with fixed batch norm statistics."""

    _schedule: Any = field(init=False, repr=False)
    _pending: list[Period] = field(init=False, repr=False, factory=list)

    def __attrs_post_init__(self) -> None:
        if not self.patterns:
            raise ValueError('patterns: is empty; name what to freeze, such as ["embed.*"]')

    @hookimpl
    def adapt_model(self, run: Run) -> None:
        """Freeze the parameters that match the patterns."""
        from fundamentallm_freeze.schedule import freeze

        self._schedule = freeze(run.model, self, run.name_of(self))

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Unfreeze what is already unfrozen at the step that the run resumes from."""
        self._schedule.check(run)
        self._pending = self._schedule.apply(run)

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        """Unfreeze the parameters whose period has ended."""
        for period in self._pending:
            if period.reached(run.progress):
                self._pending = self._schedule.apply(run)
                break

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Freeze again what was still frozen at the step that the run went back to."""
        self._pending = self._schedule.apply(run)
