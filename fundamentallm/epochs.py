"""The events of epochs. They follow from the counts of samples alone, so that no state of theirs
needs a checkpoint: a resumed run goes on exactly where the original would have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fundamentallm.data import Progress
    from fundamentallm.run import Run


def begins_epoch(progress: Progress) -> bool:
    """Return whether the next step is the first one of an epoch."""
    size = progress.epoch_samples
    if not size:
        return False
    # The last step completed an epoch if its samples passed a multiple of the epoch's size.
    return not progress.step or progress.before[0] // size < progress.samples // size


def start_epoch(run: Run) -> None:
    """Emit ``on_epoch_start`` if the next step is the first one of an epoch."""
    progress = run.progress
    if progress.epoch_samples and begins_epoch(progress):
        run.hook.on_epoch_start(run=run, epoch=progress.samples // progress.epoch_samples)


def end_epochs(run: Run, since: int, *, begun: bool = True) -> None:
    """Emit ``on_epoch_end`` for each epoch that was completed since there were ``since`` samples.

    A large window may complete several: those within it start and end here. ``begun`` is whether
    the first one was started.
    """
    size = run.progress.epoch_samples
    if not size:
        return
    for epoch in range(since // size, run.progress.samples // size):
        if not begun:
            run.hook.on_epoch_start(run=run, epoch=epoch)
        run.hook.on_epoch_end(run=run, epoch=epoch)
        begun = False
