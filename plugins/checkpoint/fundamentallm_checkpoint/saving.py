"""One save after the other: written at once, or beside the steps by a thread of its own."""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import TYPE_CHECKING

import attrs

from fundamentallm_checkpoint import publication, store
from fundamentallm_checkpoint.publication import NotSavedError
from fundamentallm_checkpoint.staging import Arena

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import TypeAlias

    from fundamentallm import Run
    from fundamentallm_checkpoint.contents import Packed, Report
    from fundamentallm_checkpoint.manifest import Manifest
    from fundamentallm_checkpoint.retention import Rules

    Saves: TypeAlias = Callable[[], Path]

_LOOK = 0.1  # seconds between two looks at a save that is waited for

log = logging.getLogger("fundamentallm")


@attrs.frozen
class Job:
    """What is to be saved, where, and what may be deleted once it is."""

    home: Path
    packed: Packed
    draft: Manifest
    rules: Rules

    def run(self, report: Report | None = None) -> Path:
        """Save, then delete what need not stay; return the new folder."""
        folder = publication.publish(self.home, self.packed, self.draft, report)
        store.prune(self.home, self.rules, self.draft.run)
        return folder


class Flight:
    """A save in a thread. ``done`` and ``total`` count its bytes."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.done, self.total = 0, 0
        self._folder: Path | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fly, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether it is done, or has failed."""
        return not self._thread.is_alive()

    def wait(self, report: Report) -> None:
        """Wait until it is over, telling how far it is. A signal's handler runs meanwhile."""
        told = False
        while not self.over:
            self._thread.join(_LOOK)
            if self.total > 0 and not self.over:
                told = True
                report(min(self.done, self.total - 1), self.total)
        if told:
            report(self.total, self.total)

    def result(self) -> Path:
        """Return the durable folder, or raise what went wrong."""
        if self._error is not None:
            raise self._error
        assert self._folder is not None
        return self._folder

    def _fly(self) -> None:
        try:
            self._folder = self.job.run(self._count)
        except BaseException as error:  # noqa: BLE001 - raised again where the run can hear it
            self._error = error

    def _count(self, done: int, total: int) -> None:
        self.done, self.total = done, total


class Writer:
    """Saves, one at a time, and tells the run at its safe points.

    ``goes_on``: a disk that refuses a checkpoint is a warning, and no end of the run; but for the
    last one, which no later one makes good.
    """

    def __init__(self, *, pinned: bool, goes_on: bool) -> None:
        self.flight: Flight | None = None
        self.arena = Arena(pinned=pinned)
        self._goes_on = goes_on

    def save(self, run: Run, job: Job, *, beside: bool) -> None:
        """Save now, or copy now and save beside the steps that follow. At most one save is under
        way: another waits for it."""
        self.collect(run, wait=True)
        copied = self._copied(job) if beside else None
        if copied is not None:
            try:
                self.flight = Flight(copied)
            except RuntimeError as error:  # the system has no thread to spare
                log.warning("the save of step %d is waited for: %s", job.draft.step, error)
        if self.flight is None:
            self._tell(run, partial(job.run, partial(run.report, "saving")), last=run.ending)

    def collect(self, run: Run, *, wait: bool) -> None:
        """Tell the run of the save under way, if it is over; ``wait`` until it is."""
        flight = self.flight
        if flight is None or not (wait or flight.over):
            return
        flight.wait(partial(run.report, "saving"))
        self.flight = None
        self._tell(run, flight.result)

    def close(self, run: Run) -> None:
        """Wait for what is under way after the last safe point, and free the memory."""
        flight, self.flight = self.flight, None
        try:
            if flight is not None:
                flight.wait(partial(run.report, "saving"))
                folder = self._folder(flight.result, then="")
                if folder is not None:
                    log.info("saved %s", folder)
        finally:
            self.arena.release()

    def _copied(self, job: Job) -> Job | None:
        try:
            return attrs.evolve(job, packed=self.arena.copy(job.packed))
        except (MemoryError, RuntimeError) as error:
            log.warning(
                "no memory for a copy, so the save of step %d is waited for: %s",
                job.draft.step,
                error,
            )
            return None

    def _tell(self, run: Run, save: Saves, *, last: bool = False) -> None:
        folder = self._folder(save, then="" if run.ending else " The run goes on.", last=last)
        if folder is not None:
            run.hook.on_checkpoint_saved(run=run, folder=folder)

    def _folder(self, save: Saves, *, then: str, last: bool = False) -> Path | None:
        try:
            return save()
        except NotSavedError as error:
            if not self._goes_on:
                raise
            if last:
                raise NotSavedError(
                    f"{error} It was the run's last: what was learned since the one before is not"
                    ' saved, so the run has failed, although on_save_error is "continue".'
                ) from error
            log.warning("%s%s", error, then)
            return None
