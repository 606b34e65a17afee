"""Log the metrics of a run to Weights & Biases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fundamentallm import field, gt, hookimpl, plugin, state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fundamentallm import Outcome, Run


@plugin
class Wandb:
    """Log every row of metrics to Weights & Biases, with the settings as its config.

    W&B's step is the step of the run. A run that is resumed or rewound continues its W&B run: the
    history after the checkpoint's step is removed, so that no step is there twice.
    """

    role = "observer"

    mode: Literal["online", "offline", "disabled"] = "offline"
    """Send rows to the server at once, store them in ``wandb/`` in the run folder for
    ``wandb sync``, or do nothing. The environment variable WANDB_MODE has no effect."""
    project: str = "fundamentallm"
    """Project of the W&B run."""
    entity: str | None = None
    """User or team of the project; by default that of the login."""
    name: str | None = None
    """Name of the W&B run; by default that of the run."""
    group: str | None = None
    """Group under which W&B shows related runs."""
    tags: list[str] = field(factory=list)
    """Tags of the W&B run, to filter runs by."""
    start_seconds: float = field(default=30.0, validator=gt(0))
    """Longest wait for the login, and for the server to open the run."""
    end_seconds: float = field(default=60.0, validator=gt(0))
    """Longest wait at the end of the run for the upload of the remaining rows."""

    id: str | None = state(None)

    _session: Any = field(init=False, default=None)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Open a W&B run, or continue the one of the checkpoint from its step on."""
        if run.rank == 0 and self.mode != "disabled":
            # A signal may have prevented the row of the last step. The resumed run logs it first.
            self._open(run, run.progress.logged_step)

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Remove the history of the steps after the checkpoint."""
        if self._session is not None:
            session, self._session = self._session, None
            session.close(0)
            self._open(run, run.progress.step)

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """Queue the row for W&B's process, which stores or uploads it."""
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
        """Close the W&B run as finished or failed, with outcome and reason in its summary."""
        if self._session is not None:
            session, self._session = self._session, None
            session.close(exit_code(run, outcome), outcome=outcome, reason=reason(run))

    def _open(self, run: Run, settled: int) -> None:
        from fundamentallm_wandb.session import Session, new_id

        # A run at step 0 has no history to continue, even if a checkpoint has an id.
        continued = self.id if settled > 0 else None
        self.id = continued or new_id()
        self._session = Session(run, self, settled if continued else None)


def exit_code(run: Run, outcome: Outcome) -> int:
    """Return the exit code for W&B, which shows 0 as finished and others as failed."""
    if outcome == "interrupted":
        return 128 + (run.signal or 2)
    return 1 if outcome == "failed" else 0


def reason(run: Run) -> str | None:
    """Return the error or the reason for stopping; None if there is none."""
    return str(run.error) if run.error is not None else run.stop_reason
