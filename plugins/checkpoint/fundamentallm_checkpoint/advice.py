"""What to do after a bad end: which checkpoint there is, and how to go on from it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from fundamentallm import DataError, SettingsError
from fundamentallm_checkpoint import manifest, store

if TYPE_CHECKING:
    from fundamentallm import Run
    from fundamentallm_checkpoint import Checkpoint


def add(run: Run, instance: Checkpoint) -> None:
    """Add to a failed run's error where its newest finite checkpoint is, and what resumes it."""
    # The settings or the data have to be mended first; to resume would only repeat the error.
    if run.error is None or run.rank or isinstance(run.error, SettingsError | DataError):
        return
    home = instance.home(run)
    kept = (
        [
            one
            for one in store.sound(home, instance.run_id)
            if one.finite and one.contents == manifest.ALL
        ]
        if instance.run_id
        else []
    )
    folders = [home / manifest.folder_name(step) for step in sorted(one.step for one in kept)]
    useful = [folder for folder in folders if folder.absolute() not in instance.unsound]
    if useful:
        newest = shlex.quote(str(useful[-1]))
        resume = f"fundamentallm resume {shlex.quote(str(run.folder))}"
        run.error.add_note(f"the newest finite checkpoint is {newest}; resume with: {resume}")
