"""Measure seconds by phase and plugin; a call counts without the calls inside it."""

from __future__ import annotations

import time
from collections import defaultdict
from operator import sub
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Call: TypeAlias = Callable[..., Any]
    Key: TypeAlias = tuple[str, str]  # phase and plugin
    Part: TypeAlias = tuple[Key | None, Key | None, Any, Any]

# Written out, as where the time of a hook counts is a choice: the roles of plugins are another one.
PHASES: Mapping[str, tuple[str, ...]] = {
    "start-up": (
        "build_data",
        "build_tokenizer",
        "build_model",
        "adapt_model",
        "checkpoint_activations",
        "compile_model",
        "distribute_model",
        "build_optimizer",
        "on_train_start",
    ),
    "restore": ("read_checkpoint", "on_rewind"),
    "data": ("collect_batches", "weigh_window"),
    "micro-batch": ("train_microbatch",),
    "forward": ("forward",),
    "backward": ("backward",),
    "gradients": ("finish_gradients", "judge_step", "edit_gradients"),
    "optimizer": ("lr_factor", "optimizer_step"),
    "events": ("on_step_start", "settle_step", "on_step_end"),
    "processes": ("agree", "gather", "spread"),
    "epoch": ("on_epoch_start", "on_epoch_end"),
    "validation": ("validate", "measure_split", "on_validation_end", "evaluation_weights"),
    "log": ("reduce_metrics", "on_log", "on_histogram", "on_progress"),
    "safe point": ("on_safe_point", "on_checkpoint_saved"),
}
"""The hooks of each phase, in the order of a run."""

PHASE_OF = {hook: phase for phase, hooks in PHASES.items() for hook in hooks}
BETWEEN = frozenset(("start-up", "restore", "epoch", "validation", "log", "safe point"))
"""The phases outside the steps: rare enough to be timed always."""
SPLIT = ("", "micro-batch")
"""In these phases a nested call counts for its own phase."""


@attrs.frozen
class Marks:
    """Moments of a step: of the host, or of a device that executes its queue later."""

    take: Callable[[], Any]
    seconds: Callable[[Any, Any], float]
    """Seconds from the second moment to the first; both have been reached."""
    reached: Callable[[Any], bool]
    wait: Callable[[], None]
    """Wait until the device has finished its queue."""


def of_host(now: Callable[[], float]) -> Marks:
    """Return the moments of the host: seconds, reached at once."""
    return Marks(now, sub, lambda _: True, lambda: None)


class Clock:
    """Times calls: those between steps in seconds of the host, the parts of steps by moments.

    A nested call counts for its own plugin, in the phase of the outermost call: the forward passes
    of a validation are validation. Only those of a micro-batch have phases of their own. ``now``
    returns seconds from any origin.
    """

    def __init__(
        self, now: Callable[[], float] = time.perf_counter, marks: Marks | None = None
    ) -> None:
        self.now = now
        self.marks = marks or of_host(now)
        self.between = 0.0
        """Total seconds of the calls between steps."""
        self.parts: list[Part] = []
        """The calls timed in a step: key, key of the outer call, begin and end. Without keys: time
        between steps."""
        self._taken: defaultdict[Key, list[float]] = defaultdict(lambda: [0.0])
        self._phase = ""
        self._key: Key | None = None
        self._inside = 0.0
        self._since = 0.0

    @property
    def seconds(self) -> dict[Key, float]:
        """Seconds of the calls between steps by phase and plugin, without nested calls."""
        return {key: taken[0] for key, taken in self._taken.items()}

    @property
    def in_call(self) -> bool:
        """Whether a timed call is under way."""
        return bool(self._phase)

    def in_steps(self) -> float:
        """Return the seconds until now, from any origin, without the calls between steps."""
        return (self._since if self._phase in BETWEEN else self.now()) - self.between

    def timed(self, plugin: str, hook: str, call: Call, *, in_step: bool = False) -> Call:
        """Return ``call`` with a timer; ``in_step`` if the step is timed hook by hook."""
        part = self._part(plugin, hook, call)
        if PHASE_OF[hook] not in BETWEEN:
            return part
        own, now, mark = PHASE_OF[hook], self.now, self.marks.take
        taken = self._taken[own, plugin]

        # Some of these are called in every step, so the usual case comes first.
        def timer(**given: Any) -> Any:
            if self._phase:
                return part(**given)
            self._phase, self._inside = own, 0.0
            began = mark() if in_step else None
            self._since = start = now()
            try:
                return call(**given)
            finally:
                spent = now() - start
                self._phase = ""
                taken[0] += spent - self._inside
                self.between += spent
                if in_step:
                    self.parts.append((None, None, began, mark()))

        return timer

    def _part(self, plugin: str, hook: str, call: Call) -> Call:
        own, mark = PHASE_OF[hook], self.marks.take

        def part(**given: Any) -> Any:
            outer, parent = self._phase, self._key
            if outer in BETWEEN:
                return self._nested(plugin, call, given)
            self._phase = phase = own if outer in SPLIT else outer
            self._key = key = (phase, plugin)
            start = mark()
            try:
                return call(**given)
            finally:
                self.parts.append((key, parent, start, mark()))
                self._phase, self._key = outer, parent

        return part

    def _nested(self, plugin: str, call: Call, given: dict[str, Any]) -> Any:
        inside, self._inside = self._inside, 0.0
        start = self.now()
        try:
            return call(**given)
        finally:
            spent = self.now() - start
            self._taken[self._phase, plugin][0] += spent - self._inside
            self._inside = inside + spent


def added(parts: list[Part], seconds: Callable[[Any, Any], float]) -> dict[Key | None, float]:
    """Add up parts by phase and plugin, without nested ones; None is the time between steps."""
    taken: defaultdict[Key | None, float] = defaultdict(float)
    for key, parent, start, end in parts:
        spent = seconds(end, start)
        taken[key] += spent
        if parent is not None:
            taken[parent] -= spent
    return taken
