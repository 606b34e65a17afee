"""An open W&B run: this process hands it rows, another one keeps or sends them."""

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
    """The W&B run ``own.id``: a new one, or the known one behind its ``settled`` step."""

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
            # To cut off and to continue is the same request; rows up to this step stay.
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
                reinit="create_new",  # whatever else this process logs is not touched
                settings=quiet,
            )
        except wandb.Error as error:
            raise RuntimeError(advice(own, error)) from error
        later = f"to send it later: wandb sync {Path(self._run.dir).parent}"
        log.info("wandb: %s", self._run.url if own.mode == "online" else later)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Hand over a row; it is one step of the W&B run."""
        self._run.log(metrics, step=step)

    def histogram(
        self, name: str, step: int, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Add a histogram to the row of the step, whichever of them comes first."""
        # Lists do as well as the arrays that its types ask for.
        found = wandb.Histogram(np_histogram=(list(counts), list(edges)))  # type: ignore[arg-type]
        self._run.log({name: found}, step=step)

    def close(self, exit_code: int, **summary: str | None) -> None:
        """Tell how the run ended, and wait until the rows are where they belong."""
        self._run.summary.update({name: text for name, text in summary.items() if text})
        self._run.finish(exit_code=exit_code)


def new_id() -> str:
    """Return an id that no other run has, without drawing from the run's random numbers."""
    return secrets.token_hex(6)


def advice(own: Wandb, error: Exception) -> str:
    """Say what could not be opened, why, and what to do."""
    path = "/".join(part for part in (own.entity, own.project, own.id) if part)
    offline = own.mode == "offline"
    act = "" if offline else '; run "wandb login", or set wandb.mode = "offline" and sync later'
    return f"wandb: cannot open the run {path} ({own.mode}): {error}{act}"
