"""Save a run: one immutable request per save, carried out at once or in a thread.

A save is a straight line: ``Checkpoint`` decides and makes a ``SaveRequest``, ``Writer`` copies it,
``carry_out`` publishes it and deletes what need not stay. At most one save is pending.
"""

from __future__ import annotations

import errno
import logging
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import torch

from fundamentallm import StorageError
from fundamentallm_checkpoint.storage import directory, publish, safetensors, snapshot
from fundamentallm_checkpoint.storage.host_buffer import HostBuffer
from fundamentallm_checkpoint.storage.manifest import ALL, Manifest, folder_name
from fundamentallm_checkpoint.storage.publish import NotSavedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fundamentallm import Run, Snapshot
    from fundamentallm_checkpoint.storage.retention import Rules
    from fundamentallm_checkpoint.storage.snapshot import PackedSnapshot, Report

_REFRESH = 0.1  # seconds between two reports of a save that the training waits for
_WITH_MOMENTS = 3  # Adam has two numbers for each weight

log = logging.getLogger("fundamentallm")


@attrs.frozen(kw_only=True)
class SaveRequest:
    """One save, fully decided: what to write, where, and what may be deleted once it is durable.

    It is made once, in the training thread, and never changed: the writer's thread needs no lock.
    """

    home: Path
    packed: PackedSnapshot
    draft: Manifest
    """The manifest without files: step, run, metrics, tags."""
    existing: tuple[Manifest, ...]
    """The checkpoints in ``home`` so far; none but these are ever deleted."""
    rules: Rules


@attrs.frozen
class Saved:
    """A finished save: the durable folder, and the checkpoints that ``home`` has now."""

    folder: Path
    existing: tuple[Manifest, ...]


def carry_out(request: SaveRequest, report: Report | None = None) -> Saved:
    """Publish the checkpoint, then delete what the rules do not keep."""
    written = publish.publish(request.home, request.packed, request.draft, report)
    # A run may repeat the step that it resumed from; its checkpoint was replaced just now.
    others = [one for one in request.existing if one.step != written.step]
    # Only now: until the new one is durable, a killed run resumes from the old ones.
    left = directory.prune(request.home, [*others, written], request.rules)
    return Saved(request.home / folder_name(written.step), tuple(left))


class PendingSave:
    """A save in a thread of its own. ``done`` and ``total`` count its bytes."""

    def __init__(self, request: SaveRequest) -> None:
        self.request = request
        self.done, self.total = 0, 0
        self._saved: Saved | None = None
        self._error: BaseException | None = None
        # A daemon: an interpreter that exits must not wait for a disk that hangs.
        self._thread = threading.Thread(target=self._save, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def finished(self) -> bool:
        """Whether it has ended, also with an error."""
        return not self._thread.is_alive()

    def wait(self, report: Report) -> None:
        """Wait until it has finished, with progress. Signals are handled meanwhile."""
        reported = False
        while not self.finished:
            self._thread.join(_REFRESH)
            if self.total > 0 and not self.finished:
                reported = True
                # Never complete before the thread has ended: it still renames and deletes folders.
                report(min(self.done, self.total - 1), self.total)
        if reported:
            report(self.total, self.total)

    def result(self) -> Saved:
        """Return the result, or raise the error of the thread."""
        if self._error is not None:
            raise self._error
        assert self._saved is not None
        return self._saved

    def _save(self) -> None:
        try:
            self._saved = carry_out(self.request, self._count)
        except BaseException as error:  # noqa: BLE001 - raised by ``result`` in the training thread
            self._error = error

    def _count(self, done: int, total: int) -> None:
        # Called in the writer's thread. No lock: the training thread only displays the numbers.
        self.done, self.total = done, total


class Writer:
    """Carries out one save after the other and reports each to the run at a safe point.

    ``existing`` are the checkpoints that are there, known in memory: a save reads no manifest.
    With ``goes_on`` a disk that refuses a checkpoint is a warning instead of the end of the run,
    except for the last checkpoint: no later checkpoint replaces it.
    """

    def __init__(self, *, pinned: bool, goes_on: bool, existing: tuple[Manifest, ...]) -> None:
        self.pending: PendingSave | None = None
        self.buffer = HostBuffer(pinned=pinned)
        self.existing = existing
        self._goes_on = goes_on

    @property
    def known(self) -> list[Manifest]:
        """The checkpoints that are there, and the one that is being written."""
        pending = [self.pending.request.draft] if self.pending is not None else []
        return [*self.existing, *pending]

    def save(self, run: Run, request: SaveRequest, *, asynchronous: bool) -> None:
        """Write now, or copy now and write while the training goes on. None may be pending."""
        copied = self._copied(request) if asynchronous else None
        if copied is not None:
            try:
                self.pending = PendingSave(copied)
            except RuntimeError as error:  # the system has no thread to spare
                log.warning("step %d waits for its save: %s", request.draft.step, error)
        # There was no memory for a copy or no thread: a step that waits is better than no save.
        if self.pending is None:
            save = partial(carry_out, request, partial(run.report, "saving"))
            self._finish(run, save, last=run.ending)

    def collect(self, run: Run, *, wait: bool) -> None:
        """Report the pending save to the run if it has finished; with ``wait``, wait for it."""
        pending = self.pending
        if pending is None or not (wait or pending.finished):
            return
        pending.wait(partial(run.report, "saving"))
        # Before ``_finish``, which may raise: ``close`` must not raise the same error again.
        self.pending = None
        # The last save of a run is never pending, so this is not the last one.
        self._finish(run, pending.result, last=False)

    def close(self, run: Run) -> None:
        """Wait for a save that is pending after the last safe point, and free the memory."""
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                pending.wait(partial(run.report, "saving"))
                saved = self._result(pending.result, then="")
                # No ``on_checkpoint_saved``: after the last safe point plugins are closing.
                if saved is not None:
                    log.info("saved %s", saved.folder)
        finally:
            self.buffer.release()

    def _copied(self, request: SaveRequest) -> SaveRequest | None:
        try:
            return attrs.evolve(request, packed=self.buffer.copy(request.packed))
        except (MemoryError, RuntimeError) as error:
            log.warning(
                "no memory for a copy, so step %d waits for its save: %s",
                request.draft.step,
                error,
            )
            return None

    def _finish(self, run: Run, save: Callable[[], Saved], *, last: bool) -> None:
        saved = self._result(save, then="" if run.ending else " The run goes on.", last=last)
        if saved is not None:
            # Not in the writer's thread: plugins are called in the main thread only.
            run.hook.on_checkpoint_saved(run=run, folder=saved.folder)

    def _result(self, save: Callable[[], Saved], *, then: str, last: bool = False) -> Saved | None:
        try:
            saved = save()
        except NotSavedError as error:
            if not self._goes_on:
                raise
            if last:
                raise NotSavedError(
                    f"{error} It was the last of the run: what was learned since the one before is"
                    ' not saved, so the run has failed although on_save_error is "continue".'
                ) from error
            log.warning("%s%s", error, then)
            return None
        self.existing = saved.existing
        return saved


def check_can_save(home: Path, run: Run, weights: dict[str, Any], contents: str) -> None:
    """Check before the first step that checkpoints can be written.

    Raises ``StorageError`` if ``weights``, the model's state dict, cannot be stored, if ``home``
    is not writable, or if it has no room for a checkpoint as large as the run is now.
    """
    safetensors.check({n: value for n, value in weights.items() if isinstance(value, torch.Tensor)})
    size = _size_now(run, contents)
    try:
        # A real write: the permission bits do not show a disk that is mounted read-only.
        publish.probe(home)
        publish.check_space(home, size)
    except OSError as error:
        raise StorageError(
            f"no checkpoint can be saved: {error.filename}: {error.strerror}"
        ) from error
    # Most optimizers make their state in the first step: until then its size is a guess.
    if contents == ALL and not run.optimizer.state:
        try:
            publish.check_space(home, size * _WITH_MOMENTS)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            log.warning(
                "with the optimizer's state, a checkpoint may not fit: %s: %s",
                error.filename,
                error.strerror,
            )


def check_size(home: Path, values: Snapshot, contents: str, *, goes_on: bool) -> int:
    """Return the bytes of a checkpoint after the first step, now that all state is there.

    Raises ``StorageError`` for state that no checkpoint can store, and if there is no room for a
    checkpoint; with ``goes_on`` the latter is a warning.
    """
    size = snapshot.pack(values, contents=contents).size
    try:
        publish.check_space(home, size)
    except OSError as error:
        text = f"no checkpoint can be saved: {error.filename}: {error.strerror}"
        if error.errno == errno.ENOSPC and not goes_on:
            raise StorageError(text) from error
        log.warning("%s", text)
    return size


def _size_now(run: Run, contents: str) -> int:
    # Not by the state dict: where a model is sharded, all processes would have to take part.
    tensors = [*run.model.parameters(), *run.model.buffers()]
    if contents == ALL:
        tensors += [
            value
            for state in run.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ]
    return sum(tensor.nbytes for tensor in tensors)
