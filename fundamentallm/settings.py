"""The core's own table: what the loop itself needs to know."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from attrs.validators import ge, matches_re, optional

from fundamentallm.periods import Period
from plugtable import field, plugin


def _of_time(_: object, __: object, value: Period) -> None:
    if value.seconds is None:
        raise ValueError(f"expected a time such as '230 minutes', got '{value}'")


@plugin
class RunSettings:
    """The ``[run]`` table: what the loop itself needs to know."""

    length: Period
    """How long to train: a period such as "2000 steps", "3 epochs", "1e9 tokens", "2 hours"."""
    validate_every: Period | None = None
    """How often to validate; the last step is validated in any case, if there is held-out data."""
    validate_first: bool = False
    """Validate before the first step, too: where the untrained model stands."""
    log_every: Period = Period(50)
    """How often metrics become numbers and go to the loggers: the mean since the last time."""
    max_time: Period | None = field(default=None, validator=optional(_of_time))
    """Stop and save, to be resumed, when the command has run so long: a time, such as
    "230 minutes" where a batch system allows four hours."""
    seed: int = field(default=1337, validator=ge(0))
    """The one seed: initial weights, data order, dropout and samples all derive from it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; "auto" takes the GPU if there is one."""
    name: str | None = field(default=None, validator=optional(matches_re(r"\w[\w.+-]*")))
    """The run's name, and its folder's; by default that of the settings file."""
    folder: Path = Path("runs")
    """The folder that run folders are made in; the default is one where the command is run."""
