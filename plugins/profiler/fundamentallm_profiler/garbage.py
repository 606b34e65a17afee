"""Python's garbage collection at chosen steps, instead of in the middle of any."""

from __future__ import annotations

import gc

from fundamentallm import Run, field, ge, hookimpl, in_, plugin


@plugin
class Gc:
    """Collect garbage every so many steps, and at no other time.

    Python collects whenever enough objects have been made, which is at another moment in every
    process. All processes of a run that wait for each other then wait for each collection of each.
    """

    role = "control"

    every: int = field(default=50, validator=ge(1))
    """Steps between two collections; steps, since all processes must agree on them."""
    generation: int = field(default=1, validator=in_((0, 1, 2)))
    """How much is looked through: 0 the youngest objects, 1 more of them, 2 all."""
    freeze: bool = True
    """Leave out, for the rest of the run, all objects that are there when the training starts."""

    def __attrs_post_init__(self) -> None:
        # Not settings, not state: what must be put back.
        self._enable = self._unfreeze = False

    @hookimpl
    def on_train_start(self) -> None:
        """Collect what building has left, and switch the automatic collection off."""
        self._enable = gc.isenabled()
        gc.disable()
        gc.collect()
        # What somebody else has frozen must not be thawed here.
        if self.freeze and not gc.get_freeze_count():
            self._unfreeze = True
            gc.freeze()

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        """Collect, if it is due."""
        if not run.progress.step % self.every:
            gc.collect(self.generation)

    @hookimpl
    def on_train_end(self) -> None:
        """Put everything back as it was."""
        if self._unfreeze:
            gc.unfreeze()
        if self._enable:
            gc.enable()
        self._enable = self._unfreeze = False
