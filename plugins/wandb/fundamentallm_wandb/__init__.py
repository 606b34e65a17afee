"""The metrics of a run in Weights & Biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fundamentallm import field, gt, hookimpl, plugin, state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fundamentallm import Outcome, Run


@plugin
class Wandb:
    """Log every row of metrics to Weights & Biases, with the settings as its config.

    W&B's step is the step of the run. A run that is resumed or goes back continues its W&B run from
    there: the history behind that step is cut off, so that no step is there twice.
    """

    role = "observer"

    mode: Literal["online", "offline", "disabled"] = "offline"
    """Send rows to the server as they come, keep them in ``wandb/`` in the run folder for
    ``wandb sync``, or do nothing. The variable WANDB_MODE does not change it."""
    project: str = "fundamentallm"
    """The project that the run belongs to."""
    entity: str | None = None
    """User or team of the project; by default that of the login."""
    name: str | None = None
    """Name of the W&B run; by default that of the run."""
    group: str | None = None
    """What runs that belong together are shown under."""
    tags: list[str] = field(factory=list)
    """Words to find the run by."""
    start_seconds: float = field(default=30.0, validator=gt(0))
    """How long to wait for the login and for the server to open the run."""
    end_seconds: float = field(default=60.0, validator=gt(0))
    """How long the end of the run waits for the server to take what is left."""

    id: str | None = state(None)

    _session: Any = field(init=False, default=None)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Begin a W&B run, or continue that of the checkpoint from the checkpoint's step on."""
        if run.rank == 0 and self.mode != "disabled":
            # What a signal kept from being logged is logged as soon as the run goes on.
            self._open(run, run.progress.logged_step)

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Cut off the history of the steps that have become void."""
        if self._session is not None:
            session, self._session = self._session, None
            session.close(0)
            self._open(run, run.progress.step)

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """Hand the row to the process that keeps or sends it."""
        if self._session is not None:
            self._session.log(run.progress.step, metrics)

    @hookimpl
    def on_histogram(
        self, name: str, step: int, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Add a histogram to the row of its step."""
        if self._session is not None:
            self._session.histogram(name, step, edges, counts)

    @hookimpl
    def on_train_end(self, run: Run, outcome: Outcome) -> None:
        """End the W&B run as finished or as failed, with what happened in its summary."""
        if self._session is not None:
            session, self._session = self._session, None
            session.close(exit_code(run, outcome), outcome=outcome, reason=reason(run))

    def _open(self, run: Run, settled: int) -> None:
        from fundamentallm_wandb.session import Session, new_id

        # One that starts at step 0 has no history to continue.
        continued = self.id if settled > 0 else None
        self.id = continued or new_id()
        self._session = Session(run, self, settled if continued else None)


def exit_code(run: Run, outcome: Outcome) -> int:
    """Return what W&B shows the run as: finished if it is 0, else failed."""
    if outcome == "interrupted":
        return 128 + (run.signal or 2)
    return 1 if outcome == "failed" else 0


def reason(run: Run) -> str | None:
    """Say why the run is over, if there is anything to say."""
    return str(run.error) if run.error is not None else run.stop_reason
