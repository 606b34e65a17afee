"""Handle what ends long runs: NaN, loss spikes, out of memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fundamentallm import (
    FundamentalError,
    NotFiniteError,
    OutOfMemoryError,
    Rejection,
    SettingsError,
    field,
    ge,
    gt,
    hookimpl,
    plugin,
    ran_out_of_memory,
    state,
    state_fields,
)
from fundamentallm_guard import spikes
from fundamentallm_guard.rejection import find_rejection, is_overflow

if TYPE_CHECKING:
    from fundamentallm import Batch, Run

log = logging.getLogger("fundamentallm")


@plugin
class Guard:
    """Reject steps with NaN, loss spikes or out of memory; skip them, rewind or split batches.

    A skipped step changes the counts of attempted steps and of data, and nothing else: weights,
    random state and running statistics are as if the data had lacked it. To judge a step, the host
    waits for the device once.
    """

    role = "training"
    # A resumed run may add, change or remove it: it acts only on steps that go wrong.
    free = ("*",)

    produces: ClassVar[tuple[str, ...]] = ("guard/skipped", "guard/rewinds")

    nonfinite: Literal["skip", "rewind", "stop", "off"] = "skip"
    """What to do about a loss or a gradient that is NaN or infinite: `skip` the step, `rewind` to
    a checkpoint from before it, `stop` the run with an error, or `off`: do not check."""
    spike: Literal["off", "skip", "rewind", "stop"] = "off"
    """What to do about a loss above the median + `spike_threshold` * MAD of those before it."""
    spike_window: int = field(default=100, validator=ge(5))
    """Number of losses of earlier updates to compare with; with fewer, no loss is a spike."""
    spike_threshold: float = field(default=10.0, validator=gt(0))
    """Largest distance of a loss from the median, in median absolute deviations (MAD)."""
    max_skips: int = field(default=10, validator=ge(1))
    """Largest number of consecutive skipped steps; one more ends the run with an error."""
    max_rewinds: int = field(default=10, validator=ge(1))
    """Largest number of rewinds of a run; one more ends the run with an error."""
    oom: Literal["stop", "skip", "split"] = "stop"
    """What to do when a micro-batch does not fit into memory: `stop` with a memory report, `skip`
    the step, or `split` every micro-batch in two from then on."""

    skipped: int = state(0)
    rewinds: int = state(0)
    halvings: int = state(0)  # how often each micro-batch is split in two
    in_a_row: int = state(0)  # steps skipped since the last update
    steps: list[int] = state(factory=list)  # the last updates, and
    losses: list[float] = state(factory=list)  # their losses

    _before: Any = field(init=False, repr=False)  # the StepState
    _parameters: list[Any] = field(init=False, repr=False)
    _check: Any = field(init=False, default=None, repr=False)
    _rejection: Rejection | None = field(init=False, default=None)
    _loss: float = field(init=False, default=0.0)
    _judges: bool = field(init=False, default=True)
    _keeps_losses: bool = field(init=False, default=False)
    _warned: bool = field(init=False, default=False)
    _reported: Exception | None = field(init=False, default=None)
    """An error whose text has the memory report already."""

    def __attrs_post_init__(self) -> None:
        # A wrapper costs about ten calls a step; None in place of the method removes the hook.
        if self.oom != "split":
            self.collect_batches = None  # type: ignore[assignment,method-assign]
        if self.oom == "stop":
            self.train_microbatch = None  # type: ignore[assignment,method-assign]

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Prepare the checks; refuse `oom` settings that need a single process."""
        from fundamentallm_guard.step_state import StepState

        if self.oom != "stop" and run.world_size > 1:
            text = (
                f"{run.name_of(self)}.oom: {self.oom!r} works with one process only: the other "
                f"processes would wait for the one that ran out of memory; set oom = 'stop'"
            )
            raise _in_all(run, SettingsError(text))
        self._judges = (self.nonfinite, self.spike) != ("off", "off")
        self._keeps_losses = self.spike != "off" or self.nonfinite == "rewind"
        self._before = StepState(run)
        self._parameters = [parameter for parameter in run.parameters if parameter.numel()]
        self._check = None
        if not self._keeps_losses:
            from fundamentallm_guard.nonfinite_check import quick_check

            self._check = quick_check

    @hookimpl
    def on_step_start(self) -> None:
        """Copy the running statistics, which a rejected step must not change."""
        if self._judges or self.oom != "stop":
            self._before.save()

    @hookimpl(wrapper=True)
    def collect_batches(self) -> Generator[None, list[Batch], list[Batch]]:
        """Split the micro-batches as often as memory has required so far."""
        window = yield
        if not self.halvings:
            return window
        from fundamentallm_guard.split_batch import split

        return split(window, self.halvings)

    @hookimpl(wrapper=True)
    def train_microbatch(self, run: Run, batch: Batch) -> Generator[None, None, None]:
        """When memory runs out, reject the step or repeat it with smaller micro-batches."""
        try:
            return (yield)
        except Exception as error:
            from fundamentallm_guard import memory, split_batch

            if not ran_out_of_memory(error):
                raise
            text = memory.described(run, batch, error)
            if self.oom == "split" and split_batch.count_rows(batch) < 2:
                self._reported = OutOfMemoryError(f"{text}\n{memory.advice(self.oom)}")
                raise self._reported from error
            memory.release(error)
        # After the except clause, which keeps the tensors of the failed attempt alive.
        if self.oom == "skip":
            split_batch.abandon(run)
            self._rejection = Rejection("memory", text)
        else:
            self.halvings += 1
            log.warning("%s\nfrom now on micro-batches are split into %d", text, 2**self.halvings)
            split_batch.train_again(run, self._before)

    @hookimpl
    def judge_step(self, run: Run) -> Rejection | None:
        """Reject a step whose loss or gradients are not finite, or whose loss is a spike."""
        if self._rejection is None and self._judges:
            if self._check is not None and self._check(run):
                return None
            from fundamentallm_guard.nonfinite_check import loss_and_gradient

            self._loss, gradient = loss_and_gradient(run, self._parameters)
            if self.spike != "off" or not math.isfinite(self._loss + gradient):
                self._rejection = find_rejection(self, self._loss, gradient)
        return self._rejection

    @hookimpl
    def settle_step(self, run: Run, applied: bool) -> None:
        """Record the loss of an update; skip, rewind or stop after a rejected step."""
        mine, self._rejection = self._rejection, None
        if applied:
            self.in_a_row = 0
            if self._keeps_losses and math.isfinite(self._loss):
                self.steps.append(run.progress.step)
                self.losses.append(self._loss)
                del self.steps[: -self.spike_window], self.losses[: -self.spike_window]
        elif mine is not None and not is_overflow(mine, run.rejected):
            self._react(run, mine)
        if self.skipped and (
            run.settings.log_every.due(run.progress) or run.settings.length.reached(run.progress)
        ):
            run.log("guard/skipped", self.skipped)

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        """Add a memory report to the error of a run that ran out of memory."""
        error = run.error
        if isinstance(error, OutOfMemoryError) and error is not self._reported:
            from fundamentallm_guard import memory

            text = f"after step {run.progress.step}: {error}\n{memory.report(run.device)}"
            error.args = (f"{text}\n{memory.advice(self.oom)}",)

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Log the number of rewinds."""
        run.log("guard/rewinds", self.rewinds)

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the state. `skipped`, `rewinds` and `halvings` never decrease, also in a rewind,
        so that their limits still apply."""
        for name in {*state_fields(type(self))} & state.keys():
            mine, kept = getattr(self, name), state[name]
            if name in ("skipped", "rewinds", "halvings"):
                setattr(self, name, max(mine, kept))
            else:
                setattr(self, name, list(kept) if isinstance(kept, list) else kept)

    def _react(self, run: Run, rejection: Rejection) -> None:
        """Skip, rewind or end the run, with a message about the cause and where it began."""
        from fundamentallm_guard.diagnose import describe

        how = {"memory": "skip", "spike": self.spike}.get(rejection.cause, self.nonfinite)
        text = describe(run, rejection, self._before)
        self._before.restore()
        if how == "stop":
            setting = (
                f"{run.name_of(self)}.{'spike' if rejection.cause == 'spike' else 'nonfinite'}"
            )
            raise _in_all(run, NotFiniteError(f"{text}; {setting} = 'skip' skips such steps"))
        if how == "rewind" and self._rewind(run, text):
            return
        self.in_a_row += 1
        if self.in_a_row > self.max_skips:
            kind = OutOfMemoryError if rejection.cause == "memory" else NotFiniteError
            self._reported = kind(
                f"{text}; the {self.max_skips} steps before it were skipped already, as many as "
                f"{run.name_of(self)}.max_skips allows"
            )
            raise _in_all(run, self._reported)
        self.skipped += 1
        _warn(run, f"{text}; the step is skipped")

    def _rewind(self, run: Run, text: str) -> bool:
        """Request a rewind; return False if there is no checkpoint to rewind to."""
        from fundamentallm_guard import checkpoints

        name = run.name_of(self)
        if self.rewinds >= self.max_rewinds:
            often = f"{self.rewinds} times already, as often as {name}.max_rewinds allows"
            raise _in_all(run, NotFiniteError(f"{text}; the run was rewound {often}"))
        began = spikes.onset(self.steps, self.losses, self.spike_threshold, run.progress.step)
        # The update before the onset may be its cause, so undo it as well.
        # The last save of the first process may not have finished: it alone knows which there are.
        target = run.from_first(lambda: checkpoints.newest_sound(run, began - 1))
        if target is None:
            if not self._warned:
                _warn(
                    run,
                    f"{name}: there is no sound checkpoint from before step {began} to rewind to: "
                    "steps are skipped instead; list 'checkpoint', and let it save more often and "
                    "keep more",
                )
            self._warned = True
            return False
        self.rewinds += 1
        _warn(run, f"{text}; the run goes back to {target} and continues with the data after these")
        run.rewind(target)
        return True


def _in_all(run: Run, error: FundamentalError) -> FundamentalError:
    """Return an error that all processes raise, so that the first one alone prints it."""
    error.printed_elsewhere = run.rank > 0
    return error


def _warn(run: Run, text: str) -> None:
    """Log, in the first process, what all of them have found."""
    if run.rank == 0:
        log.warning("%s", text)
