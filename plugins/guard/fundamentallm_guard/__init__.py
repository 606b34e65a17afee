"""Survive what ends long runs: NaN, loss spikes, a lack of memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fundamentallm import (
    NotFiniteError,
    OutOfMemoryError,
    SettingsError,
    field,
    ge,
    gt,
    hookimpl,
    plugin,
    state,
    state_fields,
)
from fundamentallm_guard import spikes
from fundamentallm_guard.faults import PREFIX, Fault, find_fault

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm import Batch, Run

log = logging.getLogger("fundamentallm")


@plugin
class Guard:
    """Reject steps with NaN, loss spikes or too little memory; skip them, rewind or split.

    A skipped step leaves no trace but in the counts of attempted steps and of data: weights,
    random state and running statistics are as if the data had lacked it. To judge a step, the host
    waits for the device once.
    """

    produces: ClassVar[tuple[str, ...]] = ("guard/skipped", "guard/rewinds")

    nonfinite: Literal["skip", "rewind", "stop", "off"] = "skip"
    """What to do about a loss or a gradient that is NaN or infinite: `skip` the step, `rewind` to
    a checkpoint from before it, `stop` the run with an error, or do not look."""
    spike: Literal["off", "skip", "rewind", "stop"] = "off"
    """What to do about a loss above the median + `spike_threshold` * MAD of those before it."""
    spike_window: int = field(default=100, validator=ge(5))
    """How many losses of updates a loss is compared with; until there are so many, none is."""
    spike_threshold: float = field(default=10.0, validator=gt(0))
    """How many times the median absolute deviation (MAD) a loss may be above the median."""
    max_skips: int = field(default=10, validator=ge(1))
    """How many steps in a row may be skipped before the run ends with an error."""
    max_rewinds: int = field(default=10, validator=ge(1))
    """How often a run may be rewound before it ends with an error."""
    oom: Literal["stop", "skip", "split"] = "stop"
    """What to do when a micro-batch does not fit into memory: `stop` with a memory report, `skip`
    the step, or `split` every micro-batch in two from then on."""

    skipped: int = state(0)
    rewinds: int = state(0)
    halvings: int = state(0)  # how often micro-batches are cut in two
    in_a_row: int = state(0)  # steps skipped since the last update
    steps: list[int] = state(factory=list)  # the last updates, and
    losses: list[float] = state(factory=list)  # their losses

    _origin: Any = field(init=False, repr=False)
    _parameters: list[Any] = field(init=False, repr=False)
    _check: Any = field(init=False, default=None, repr=False)
    _fault: Fault | None = field(init=False, default=None)
    _loss: float = field(init=False, default=0.0)
    _judges: bool = field(init=False, default=True)
    _keeps_losses: bool = field(init=False, default=False)
    _warned: bool = field(init=False, default=False)
    _told: str = field(init=False, default="")
    _homes: set[Any] = field(init=False, factory=set, repr=False)

    def __attrs_post_init__(self) -> None:
        # A wrapper costs some ten calls each time; a name without a method is no hook.
        if self.oom != "split":
            self.collect_batches = None  # type: ignore[assignment,method-assign]
        if self.oom == "stop":
            self.train_microbatch = None  # type: ignore[assignment,method-assign]

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Make ready to judge; refuse what cannot be done with several processes."""
        from fundamentallm_guard.origin import Origin

        if self.oom != "stop" and run.world_size > 1:
            raise SettingsError(
                f"{self._name(run)}.oom: {self.oom!r} works with one process only: the others "
                f"would wait for the one that ran out of memory; set oom = 'stop'"
            )
        self._judges = (self.nonfinite, self.spike) != ("off", "off")
        self._keeps_losses = self.spike != "off" or self.nonfinite == "rewind"
        self._origin = Origin(run)
        self._parameters = [parameter for parameter in run.parameters if parameter.numel()]
        self._homes.add(run.folder / "checkpoints")
        if not self._keeps_losses and run.world_size == 1:
            from fundamentallm_guard.readings import Check

            self._check = Check(run.device)

    @hookimpl
    def on_step_start(self) -> None:
        """Keep the random state, should the step be rejected."""
        if self._judges or self.oom != "stop":
            self._origin.keep()

    @hookimpl(wrapper=True)
    def collect_batches(self) -> Generator[None, list[Batch], list[Batch]]:
        """Cut the micro-batches in two as often as was necessary so far."""
        window = yield
        if not self.halvings:
            return window
        from fundamentallm_guard.halves import cut

        return cut(window, self.halvings)

    @hookimpl(wrapper=True)
    def train_microbatch(self, run: Run, batch: Batch) -> Generator[None, None, None]:
        """Where memory does not suffice, reject the step or make it again in smaller parts."""
        try:
            return (yield)
        except Exception as error:
            from fundamentallm_guard import halves, memory

            if not memory.ran_out(error):
                raise
            self._told = text = memory.told(run, batch, error)
            if self.oom == "split" and halves.count_rows(batch) < 2:
                raise OutOfMemoryError(f"{text}\n{memory.advice(self.oom)}") from error
            memory.let_go(error)
        # Not within the except clause, which would keep what the failed attempt holds.
        if self.oom == "skip":
            halves.abandon(run)
            self._fault = Fault("memory", text)
        else:
            self.halvings += 1
            log.warning("%s\nfrom now on micro-batches are cut into %d", text, 2**self.halvings)
            halves.redo(run, self._origin)

    @hookimpl
    def judge_step(self, run: Run) -> str | None:
        """Reject a step whose loss or gradients are not finite, or whose loss is a spike."""
        if self._fault is None and self._judges:
            if self._check is not None and self._check.passes(run, self._parameters):
                return None
            from fundamentallm_guard.readings import of_step

            self._loss, gradient = of_step(run, self._parameters)
            if self.spike != "off" or not math.isfinite(self._loss + gradient):
                self._fault = find_fault(self, self._loss, gradient)
        return None if self._fault is None else PREFIX + self._fault.kind

    @hookimpl
    def settle_step(self, run: Run, applied: bool) -> None:
        """After an update remember its loss; do what is to be done about a rejected step."""
        fault, self._fault = self._fault, None
        if applied:
            self.in_a_row = 0
            if self._keeps_losses and math.isfinite(self._loss):
                self.steps.append(run.progress.step)
                self.losses.append(self._loss)
                del self.steps[: -self.spike_window], self.losses[: -self.spike_window]
        elif fault is not None and not fault.is_anothers(run.rejected):
            self._react(run, fault)
        if self.skipped and (
            run.settings.log_every.due(run.progress) or run.settings.length.reached(run.progress)
        ):
            run.log("guard/skipped", self.skipped)

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        """Add a memory report to the error of a run that ran out of memory."""
        error = run.error
        if isinstance(error, OutOfMemoryError) and not (self._told and self._told in str(error)):
            from fundamentallm_guard import memory

            text = f"after step {run.progress.step}: {error}\n{memory.report(run.device)}"
            error.args = (f"{text}\n{memory.advice(self.oom)}",)

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Log how often the run was rewound."""
        run.log("guard/rewinds", self.rewinds)

    @hookimpl
    def on_checkpoint_saved(self, folder: Path) -> None:
        """Remember where checkpoints are."""
        self._homes.add(folder.parent)

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. A rewind does not undo what bounds it, or memory that lacks."""
        for name in {*state_fields(type(self))} & state.keys():
            mine, kept = getattr(self, name), state[name]
            if name in ("skipped", "rewinds", "halvings"):
                setattr(self, name, max(mine, kept))
            else:
                setattr(self, name, list(kept) if isinstance(kept, list) else kept)

    def _react(self, run: Run, fault: Fault) -> None:
        """Skip, rewind or end the run, with a message that says what happened and where."""
        from fundamentallm_guard.culprit import describe

        how = {"memory": "skip", "spike": self.spike}.get(fault.kind, self.nonfinite)
        text = describe(run, fault, self._origin)
        self._origin.put_back()
        if how == "stop":
            setting = f"{self._name(run)}.{'spike' if fault.kind == 'spike' else 'nonfinite'}"
            raise NotFiniteError(f"{text}; {setting} = 'skip' passes such data by")
        if how == "rewind" and self._rewind(run, text):
            return
        self.in_a_row += 1
        if self.in_a_row > self.max_skips:
            kind = OutOfMemoryError if fault.kind == "memory" else NotFiniteError
            raise kind(
                f"{text}; the {self.max_skips} steps before it were skipped already, as many as "
                f"{self._name(run)}.max_skips allows"
            )
        self.skipped += 1
        log.warning("%s; the step is skipped", text)

    def _rewind(self, run: Run, text: str) -> bool:
        """Ask for the way back; False if there is no checkpoint to go back to."""
        from fundamentallm_guard import checkpoints

        name = self._name(run)
        if self.rewinds >= self.max_rewinds:
            raise NotFiniteError(
                f"{text}; the run was rewound {self.rewinds} times already, as"
                f" often as {name}.max_rewinds allows"
            )
        began = spikes.onset(self.steps, self.losses, self.spike_threshold, run.progress.step)
        # The update before it may be what began it, and must be undone as well.
        target = checkpoints.newest_sound(run, self._homes, began - 1)
        if target is None:
            if not self._warned:
                log.warning(
                    "%s: there is no checkpoint to go back to from step %d: steps are"
                    " skipped instead; is 'checkpoint' listed, and does it save and keep"
                    " enough?",
                    name,
                    began,
                )
            self._warned = True
            return False
        self.rewinds += 1
        log.warning("%s; the run goes back to %s and on behind these data", text, target)
        run.rewind(target)
        return True

    def _name(self, run: Run) -> str:
        return next(name for name, listed in run.plugins.items() if listed is self)
