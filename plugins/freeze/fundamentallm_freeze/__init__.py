"""Keep chosen parameters as they are, for the whole run or until a moment of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from fundamentallm import Period, field, hookimpl, plugin

if TYPE_CHECKING:
    from fundamentallm import Run

__all__ = ["Freeze"]


@plugin
class Freeze:
    """Take parameters out of training by their names, and let them in again one by one.

    What is frozen is a pure function of the run's progress: a resumed run and one that goes back to
    a checkpoint freeze what the uninterrupted one would.
    """

    # LoRA freezes all that is no adapter; what is frozen here on top of that may be an adapter.
    after: ClassVar[tuple[str, ...]] = ("lora",)

    patterns: list[str] = field()
    """Globs on full parameter names (`*` matches dots too), such as `"embed.*"`: what matches any
    of them is frozen."""
    except_for: list[str] = field(factory=list)
    """Globs on the names of parameters that are trained although one of the patterns matches."""
    unfreeze: dict[str, Period] = field(factory=dict)
    """Glob to period: when frozen parameters begin to be trained, such as `"blocks.3.*" = "500
    steps"`. Where several match, the first that comes."""
    eval_mode: bool = False
    """Whether modules whose parameters are all frozen stay in evaluation mode: without dropout, and
    with the statistics of their batch norms as they are."""

    _freezing: Any = field(init=False, repr=False)
    _waiting: list[Period] = field(init=False, repr=False, factory=list)

    def __attrs_post_init__(self) -> None:
        if not self.patterns:
            raise ValueError('patterns: is empty; name what to freeze, such as ["embed.*"]')

    @hookimpl
    def adapt_model(self, run: Run) -> None:
        """Freeze what the patterns match."""
        from fundamentallm_freeze.freezing import freeze

        name = next((n for n, one in run.plugins.items() if one is self), "freeze")
        self._freezing = freeze(run.model, self, name)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Unfreeze what a resumed run has unfrozen already."""
        self._freezing.check(run)
        self._waiting = self._freezing.follow(run)

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        """Unfreeze what is due."""
        for period in self._waiting:
            if period.reached(run.progress):
                self._waiting = self._freezing.follow(run)
                break

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Freeze again what was still frozen at the step that the run has gone back to."""
        self._waiting = self._freezing.follow(run)
