"""Run Python's garbage collection at chosen steps."""

from __future__ import annotations

import gc

from fundamentallm import Run, field, ge, hookimpl, in_, plugin

OWN = 1000
"""In a full collection, Python 3.12 freezes its immortal objects: some hundred, fewer than this."""


@plugin
class Gc:
    """Collect Python's garbage every ``every`` steps, and at no other time.

    Python collects when enough objects have been created, which happens at different moments in the
    processes of a run. Processes that wait for each other then wait for every collection.
    """

    role = "control"

    every: int = field(default=50, validator=ge(1))
    """Steps between two collections; steps, since all processes must agree on them."""
    generation: int = field(default=1, validator=in_((0, 1, 2)))
    """Generation to collect: 0 is the youngest objects, 1 includes older ones, 2 all."""
    freeze: bool = True
    """Exclude all objects that exist when the training starts from collections."""

    def __attrs_post_init__(self) -> None:
        # Not settings, not state: what must be put back.
        self._enable = self._unfreeze = False

    @hookimpl
    def on_train_start(self) -> None:
        """Collect garbage once, and disable Python's automatic collection."""
        self._enable = gc.isenabled()
        gc.disable()
        gc.collect()
        # Objects that other code has frozen must stay frozen.
        if self.freeze and gc.get_freeze_count() < OWN:
            self._unfreeze = True
            gc.freeze()

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        """Collect garbage if `every` is due."""
        if not run.progress.step % self.every:
            gc.collect(self.generation)

    @hookimpl
    def on_train_end(self) -> None:
        """Enable Python's automatic collection again."""
        if self._unfreeze:
            gc.unfreeze()
        if self._enable:
            gc.enable()
        self._enable = self._unfreeze = False
