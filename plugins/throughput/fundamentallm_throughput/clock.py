"""Where time goes: seconds by phase and plugin, each call without the calls inside it."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Call: TypeAlias = Callable[..., Any]

PHASES: Mapping[str, tuple[str, ...]] = {
    "start-up": (
        "build_data", "build_tokenizer", "build_model", "adapt_model", "checkpoint_activations",
        "compile_model", "distribute_model", "build_optimizer", "on_train_start",
    ),
    "restore": ("read_checkpoint", "on_rewind"),
    "data": ("collect_batches", "weigh_window"),
    "micro-batch": ("train_microbatch",),
    "forward": ("forward",),
    "backward": ("backward",),
    "gradients": ("finish_gradients", "judge_step", "edit_gradients"),
    "optimizer": ("lr_factor", "optimizer_step"),
    "events": ("on_step_start", "settle_step", "on_step_end"),
    "validation": ("validate", "on_validation_end", "evaluation_weights"),
    "log": ("reduce_metrics", "on_log", "on_progress"),
    "safe point": ("on_safe_point", "on_checkpoint_saved"),
}  # fmt: skip
"""The hooks of each phase, in the order of a run."""

PHASE_OF = {hook: phase for phase, hooks in PHASES.items() for hook in hooks}
BETWEEN = frozenset(("start-up", "restore", "validation", "log", "safe point"))
"""The phases outside the steps: rare enough to be timed always."""


class Clock:
    """Adds up the seconds of the calls that it has timed.

    A call inside another counts for its own plugin and not for the outer one, and in the phase of
    the outermost: the forward passes of a validation are validation. Only those of a micro-batch
    keep a phase of their own. ``now`` returns seconds, from wherever.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.between = 0.0
        """What the calls between steps took, all in all."""
        self._taken: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0])
        self._phase = ""
        self._inside = 0.0
        self._since = 0.0

    @property
    def seconds(self) -> dict[tuple[str, str], float]:
        """By phase and plugin: what the calls took, less those inside of them."""
        return {key: taken[0] for key, taken in self._taken.items()}

    def in_steps(self) -> float:
        """Return the seconds until now, from wherever, that no call between steps took."""
        return (self._since if self._phase in BETWEEN else self.now()) - self.between

    def timed(self, plugin: str, hook: str, call: Call) -> Call:
        """Return ``call``, timed."""
        own, now = PHASE_OF[hook], self.now
        between = own in BETWEEN
        taken = self._taken[own, plugin]

        # Some of these are called in every step: the usual case, in few words, comes first.
        def timer(**given: Any) -> Any:
            if self._phase:
                return self._nested(own, plugin, call, given)
            self._phase, self._inside = own, 0.0
            self._since = start = now()
            try:
                return call(**given)
            finally:
                spent = now() - start
                self._phase = ""
                taken[0] += spent - self._inside
                if between:
                    self.between += spent

        return timer

    def _nested(self, own: str, plugin: str, call: Call, given: dict[str, Any]) -> Any:
        outer, inside = self._phase, self._inside
        phase = own if outer == "micro-batch" else outer
        self._phase, self._inside = phase, 0.0
        start = self.now()
        try:
            return call(**given)
        finally:
            spent = self.now() - start
            self._taken[phase, plugin][0] += spent - self._inside
            self._phase, self._inside = outer, inside + spent
