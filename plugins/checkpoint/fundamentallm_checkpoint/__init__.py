"""Durable, verified checkpoints, and how a run resumes from them."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fundamentallm import Period, field, ge, hookimpl, plugin

# The other modules are imported in the methods that use them: ``fundamentallm show`` imports this
# one, and some of the others import torch.
if TYPE_CHECKING:
    from fundamentallm import Run, Snapshot
    from fundamentallm_checkpoint.save import SaveRequest, Writer
    from fundamentallm_checkpoint.storage.manifest import Manifest
    from fundamentallm_checkpoint.storage.retention import Rules

log = logging.getLogger("fundamentallm")


@plugin
class Checkpoint:
    """Save all that a resumed run needs, durably, and keep the last, the best and the milestones.

    Saving does not change the run. List the plugin twice, the second time under another name, to
    save with two periods; each instance has its own folder, and resuming considers all of them.
    """

    role = "saver"

    every: Period = Period(10, "minutes")
    """How often to save."""
    keep_last: int = field(default=3, validator=ge(1))
    """How many of the newest checkpoints to keep. The last two are always kept, in case one is
    damaged."""
    keep_best: int = field(default=0, validator=ge(0))
    """How many of the best checkpoints by ``monitor`` to keep as well. A step that is among them
    is saved at once, whatever ``every`` says."""
    monitor: str = "val/loss"
    """The metric that decides which are the best, at steps that are validated or logged with it."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger ``monitor`` is better."""
    keep_every: Period | None = None
    """How often to save a milestone, which is never deleted."""
    save_final: bool = True
    """Whether to save the last step, whatever ``every`` says; after a signal it always is."""
    contents: Literal["all", "model"] = "all"
    """What to save: all that resuming needs, or the model only, which takes a third of the space
    with Adam and cannot be resumed from."""
    asynchronous: bool = True
    """Whether to write in a thread while the training goes on. A step that saves then waits only
    for a copy in host memory. The last save is always waited for."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What to do if a save is due while the previous one is being written: wait for it, or skip
    the new one with a warning. Milestones, the best and the last step always wait."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What to do if the disk refuses a checkpoint: end the run, or continue with a warning; if the
    last checkpoint is refused, the run ends with an error. Earlier ones are untouched."""
    folder: Path | None = None
    """Where to put checkpoints, in ``<name of the run folder>/<run id>``; by default into the run
    folder."""
    allow_changes: list[str] = field(factory=list)
    """Settings that may differ from those of the checkpoint although they make this another run:
    names such as ``run.seed``, ``data`` for the data itself, or patterns such as ``gpt.*``."""

    run_id: str = field(init=False, default="")
    """The id of the run, as in the file ``run-id``; empty until the first start."""
    unsound: set[Path] = field(init=False, factory=set, repr=False)
    """Checkpoints that could not be used at this start; no advice names one of them."""
    _trains: bool = field(init=False, default=False)
    _writer: Any = field(init=False, default=None, repr=False)
    _first: bool = field(init=False, default=True)
    _candidate: bool = field(init=False, default=False)
    _measured: tuple[int, dict[str, float]] = field(init=False, factory=lambda: (-1, {}))
    _settings: tuple[str, dict[str, Any]] = field(init=False, factory=lambda: ("", {}))
    _superseded: list[Path] = field(init=False, factory=list)

    speaks_for_all = ("read_checkpoint",)

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Restore the names of checkpoints that a killed process was replacing."""
        from fundamentallm_checkpoint import run_id
        from fundamentallm_checkpoint.storage import directory

        # Commands that only load a run do not call this hook.
        self._trains, self._first, self._candidate = True, True, False
        self._measured, self._superseded = (-1, {}), []
        self.run_id = run_id.read_id(run.folder)
        # The others look at the checkpoints only after the first process.
        if self.run_id and run.rank == 0:
            for home in {self.home(run), *run_id.homes(run.folder)}:
                directory.recover(home)

    @hookimpl
    def read_checkpoint(self, run: Run) -> Snapshot | None:
        """Return the wanted or the newest sound snapshot of all instances."""
        from fundamentallm_checkpoint import resume

        instances = resume.all_instances(run, type(self))
        # A rewind reads, too: the newest checkpoint may be the one that is still being written.
        for instance in instances.values():
            instance.wait(run)
        return resume.read(instances, run, resumes=self._trains)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Prepare the folder, move superseded checkpoints away, check free space and write
        permission."""
        self.run_id = run.from_first(lambda: self._prepare(run))
        self._writer = self._new_writer(run)

    @hookimpl
    def on_validation_end(self, run: Run, metrics: dict[str, float]) -> None:
        """Record the metrics of a validation; a better ``monitor`` makes this step a candidate for
        the best."""
        self._record(run, metrics)

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """Record the logged metrics; a better ``monitor`` makes this step a candidate for the
        best."""
        self._record(run, metrics)

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        """Report a save that has finished, and save this step if it is due."""
        # Most steps save nothing: for them this hook is four comparisons and touches no file.
        writer, progress, keep_every = self._writer, run.progress, self.keep_every
        if writer.pending is not None:
            # At the end it waits here, where plugins still receive ``on_checkpoint_saved``.
            writer.collect(run, wait=run.ending)
        milestone = keep_every is not None and keep_every.due(progress)
        if self.every.due(progress) or milestone or run.ending or self._candidate:
            self._save_if_due(run, milestone=milestone)
        elif self._first:
            self._prepare_first_save(run)
        self._first = False

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Move the checkpoints of the steps away that the rewind made void."""
        self._measured, self._candidate = (-1, {}), False
        # Not before all processes have read the checkpoint.
        run.from_first(lambda: self._give_up_later_ones(run))

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        """Wait for a pending save; add to an error the checkpoint to resume from."""
        from fundamentallm_checkpoint import resume

        if self._writer is not None:
            # Before the advice, which can then name the checkpoint that was still being written.
            self._writer.close(run)
            self._writer = None
        resume.add_advice(run, self)

    def home(self, run: Run) -> Path:
        """Return the folder of this instance's checkpoints of ``run``."""
        from fundamentallm_checkpoint.storage import directory

        return directory.home_of(run.folder, run.name_of(self), self.folder, self.run_id)

    def rules(self) -> Rules:
        """Return the rules of what this instance keeps."""
        from fundamentallm_checkpoint.storage.retention import Rules

        return Rules(
            keep_last=self.keep_last, keep_best=self.keep_best, monitor=self.monitor, mode=self.mode
        )

    def wait(self, run: Run) -> None:
        """Wait for a pending save, so that it can be read."""
        if self._writer is not None:
            self._writer.collect(run, wait=True)

    def _prepare(self, run: Run) -> str:
        """Prepare the folder for checkpoints; return the run's id. In the first process only."""
        from fundamentallm_checkpoint import resume, run_id, save, settings_diff
        from fundamentallm_checkpoint.storage import directory

        self.run_id = run_id.ensure_id(run.folder, self.run_id)
        home = self.home(run)
        run_id.note_home(run.folder, home)
        directory.prepare(home)
        resume.supersede(run, self)
        self.unsound = set()  # they were moved away
        resume.warn_if_not_resumable(run, self)
        self._settings = run_id.settings_digest(run.folder), settings_diff.record(run)
        if not run.ending:
            save.check_can_save(home, run, run.model.state_dict(), self.contents)
        return self.run_id

    def _give_up_later_ones(self, run: Run) -> None:
        from fundamentallm_checkpoint import resume
        from fundamentallm_checkpoint.storage import directory

        # A run may rewind often: only what the last rewind moved away is kept.
        for folder in self._superseded:
            directory.remove_leftover(folder)
        self._superseded, self.unsound = resume.supersede(run, self), set()
        self._writer.existing = self._existing(run)

    def _record(self, run: Run, metrics: dict[str, float]) -> None:
        # A step may be validated and logged: both events add to the metrics of its checkpoint.
        step, known = self._measured
        now = run.progress.step
        self._measured = now, (known if step == now else {}) | metrics
        if self.keep_best and self.monitor in metrics:
            self._candidate = True

    def _new_writer(self, run: Run) -> Writer:
        from fundamentallm_checkpoint.save import Writer

        return Writer(
            pinned=run.device.startswith("cuda"),
            goes_on=self.on_save_error == "continue",
            existing=self._existing(run),
        )

    def _existing(self, run: Run) -> tuple[Manifest, ...]:
        """Read the manifests of the run's checkpoints: at the start and after a rewind only.

        In the first process, which alone decides what is saved and what stays.
        """
        from fundamentallm_checkpoint.storage import directory

        return () if run.rank else tuple(directory.sound(self.home(run), self.run_id))

    def _prepare_first_save(self, run: Run) -> None:
        """Check the room for a checkpoint, and prepare the memory for its copy.

        After the first step all state is there, also that of the optimizer and of plugins.
        """
        snapshot = run.snapshot()  # on every process: a sharded model has to be gathered
        run.from_first(lambda: self._reserve(run, snapshot))

    def _reserve(self, run: Run, snapshot: Snapshot) -> None:
        from fundamentallm_checkpoint import save

        goes_on = self.on_save_error == "continue"
        size = save.check_size(self.home(run), snapshot, self.contents, goes_on=goes_on)
        self._writer.buffer.reserve(size if self.asynchronous else 0)

    def _save_if_due(self, run: Run, *, milestone: bool) -> None:
        # Only the first process knows which checkpoints there are, and whether it still writes one.
        tags = run.from_first(lambda: self._tags(run, milestone=milestone))
        self._candidate = False
        if tags is None:
            return
        self._writer.collect(run, wait=True)
        snapshot = run.snapshot()  # on every process: a sharded model has to be gathered
        if run.rank == 0:
            # Nothing changes any more while the last checkpoint is written: it needs no copy.
            asynchronous = self.asynchronous and not run.ending
            request = self._request(run, snapshot, self._draft(run).tagged(*tags))
            self._writer.save(run, request, asynchronous=asynchronous)

    def _tags(self, run: Run, *, milestone: bool) -> list[str] | None:
        """Return the tags of the checkpoint of this step; None if it is not to be saved."""
        from fundamentallm_checkpoint.storage import retention

        writer, draft = self._writer, self._draft(run)
        best = self._candidate and retention.is_among_best(draft, writer.known, self.rules())
        final = run.ending and (self.save_final or run.signal is not None)
        if not (self.every.due(run.progress) or milestone or best or final):
            return None
        applying = {
            retention.MILESTONE: milestone,
            # A run that a signal ended is expected to continue, so its last checkpoint is not
            # final.
            retention.FINAL: run.ending and run.signal is None,
            retention.BEST: best,
        }
        tags = [tag for tag, applies in applying.items() if applies]
        must_wait = self.when_busy == "wait" or tags or run.ending
        if writer.pending is None or must_wait:
            return tags
        pending = writer.pending.request.draft.step
        log.warning("step %d is not saved: step %d is being written", draft.step, pending)
        return None

    def _request(self, run: Run, snapshot: Snapshot, draft: Manifest) -> SaveRequest:
        from fundamentallm_checkpoint import run_id
        from fundamentallm_checkpoint.save import SaveRequest
        from fundamentallm_checkpoint.storage.snapshot import pack

        home, (_, record) = self.home(run), self._settings
        # Before each save: another program may have deleted the run folder since the last one.
        run_id.restore(run, self.run_id, home)
        # With all names of tied weights: a name that is missing here would count as a buffer, and
        # an infinity in it would be accepted.
        parameters = {name for name, _ in run.model.named_parameters(remove_duplicate=False)}
        return SaveRequest(
            home=home,
            packed=pack(snapshot | {"settings": record}, parameters, self.contents),
            draft=draft,
            existing=self._writer.existing,
            rules=self.rules(),
        )

    def _draft(self, run: Run) -> Manifest:
        """Return the manifest of a checkpoint of the run as it is now, without files and tags."""
        from fundamentallm_checkpoint.storage.manifest import Manifest

        step, metrics = self._measured
        return Manifest(
            step=run.progress.step,
            run=self.run_id,
            created=time.time(),
            settings=self._settings[0],
            data=run.data.fingerprint,
            metrics=metrics if step == run.progress.step else {},
            contents=self.contents,
        )
