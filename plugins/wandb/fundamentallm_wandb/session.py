"""An open W&B run. This process queues rows; a process of W&B stores or uploads them."""

from __future__ import annotations

import copy
import logging
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import wandb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fundamentallm import Run
    from fundamentallm_wandb import Wandb

log = logging.getLogger("fundamentallm")


class Session:
    """The W&B run ``own.id``: a new one, or an existing one continued after step ``settled``."""

    def __init__(self, run: Run, own: Wandb, settled: int | None) -> None:
        quiet = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=own.start_seconds,
            login_timeout=own.start_seconds,
            finish_timeout=own.end_seconds,
        )
        which: dict[str, Any] = {"id": own.id}
        if settled is not None:
            # W&B continues the run and removes its rows after this step, in one request.
            which["resume_from"] = f"{own.id}?_step={settled}"
        try:
            self._run = wandb.init(
                **which,
                project=own.project,
                entity=own.entity,
                name=own.name or run.name,
                group=own.group,
                tags=own.tags or None,
                mode=own.mode,
                dir=str(run.folder),
                config=copy.deepcopy(run.tables),
                allow_val_change=True,
                reinit="create_new",  # the program may have a W&B run of its own open
                settings=quiet,
            )
        except wandb.Error as error:
            raise RuntimeError(advice(own, error)) from error
        later = f"to send it later: wandb sync {Path(self._run.dir).parent}"
        log.info("wandb: %s", self._run.url if own.mode == "online" else later)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Queue a row; it is one step of the W&B run."""
        self._run.log(metrics, step=step)

    def histogram(
        self, name: str, step: int, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Add a histogram to the row of the step, whichever of them comes first."""
        # The annotation wants arrays, but W&B also accepts lists.
        found = wandb.Histogram(np_histogram=(list(counts), list(edges)))  # type: ignore[arg-type]
        self._run.log({name: found}, step=step)

    def close(self, exit_code: int, **summary: str | None) -> None:
        """Set the summary, and wait until all rows are stored or uploaded."""
        self._run.summary.update({name: text for name, text in summary.items() if text})
        self._run.finish(exit_code=exit_code)


def new_id() -> str:
    """Return a random id that does not depend on the run's seed or random state."""
    return secrets.token_hex(6)


def advice(own: Wandb, error: Exception) -> str:
    """Return the message for a W&B run that cannot be opened: what, why, and what to do."""
    path = "/".join(part for part in (own.entity, own.project, own.id) if part)
    offline = own.mode == "offline"
    act = "" if offline else '; run "wandb login", or set wandb.mode = "offline" and sync later'
    return f"wandb: cannot open the run {path} ({own.mode}): {error}{act}"
