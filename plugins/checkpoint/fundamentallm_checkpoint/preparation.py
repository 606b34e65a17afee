"""What is seen before the first step: whether checkpoints can be written at all."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from fundamentallm import StorageError
from fundamentallm_checkpoint import contents, publication
from fundamentallm_checkpoint.manifest import ALL

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm import Run

_WITH_MOMENTS = 3  # Adam keeps two numbers for each weight

log = logging.getLogger("fundamentallm")


def check(home: Path, run: Run, kind: str) -> None:
    """Raise ``StorageError`` if a folder cannot be written, or holds no checkpoint of the run."""
    size = contents.size(run, kind)
    try:
        publication.probe(home)
        publication.check_space(home, size)
    except OSError as error:
        raise StorageError(
            f"no checkpoint can be saved: {error.filename}: {error.strerror}"
        ) from error
    if kind == ALL and not run.optimizer.state:
        try:
            publication.check_space(home, size * _WITH_MOMENTS)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            log.warning("with the optimizer's state, a checkpoint may not fit: %s: %s",
                        error.filename, error.strerror)  # fmt: skip
