"""What is seen before the first step: whether checkpoints can be written at all."""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING, Any

import torch

from fundamentallm import StorageError
from fundamentallm_checkpoint import contents, publication, tensors
from fundamentallm_checkpoint.manifest import ALL

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm import Run, Snapshot

_WITH_MOMENTS = 3  # Adam keeps two numbers for each weight

log = logging.getLogger("fundamentallm")


def check(home: Path, run: Run, weights: dict[str, Any], kind: str) -> None:
    """Raise ``StorageError`` if a folder cannot be written, or holds no checkpoint of the run, or
    a checkpoint cannot hold the ``weights`` of its state dict."""
    tensors.check({n: value for n, value in weights.items() if isinstance(value, torch.Tensor)})
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
            log.warning(
                "with the optimizer's state, a checkpoint may not fit: %s: %s",
                error.filename,
                error.strerror,
            )


def measure(home: Path, snapshot: Snapshot, kind: str, *, goes_on: bool) -> int:
    """Return the bytes of a checkpoint after the first step, when all that it holds is there, also
    what plugins keep. If there is no room for them that is a ``StorageError``, or, where the run
    ``goes_on``, a warning; and what no checkpoint can hold is a ``StorageError`` in any case."""
    size = contents.pack(snapshot, kind=kind).size
    try:
        publication.check_space(home, size)
    except OSError as error:
        said = f"no checkpoint can be saved: {error.filename}: {error.strerror}"
        if error.errno == errno.ENOSPC and not goes_on:
            raise StorageError(said) from error
        log.warning("%s", said)
    return size
