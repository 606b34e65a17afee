"""Durable, verified checkpoints, and the way back from them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fundamentallm import Period, field, ge, hookimpl, plugin

if TYPE_CHECKING:
    from fundamentallm import Run, Snapshot
    from fundamentallm_checkpoint.manifest import Manifest
    from fundamentallm_checkpoint.retention import Rules
    from fundamentallm_checkpoint.saving import Job, Writer

log = logging.getLogger("fundamentallm")


@plugin
class Checkpoint:
    """Save all that a resumed run needs, durably, and keep the last, the best and the milestones.

    Saving changes nothing of the run. List it twice, the second time under a name of its own, for
    two rhythms side by side; each instance has a folder of its own, and resuming looks at all.
    """

    every: Period = Period(10, "minutes")
    """How often to save."""
    keep_last: int = field(default=3, validator=ge(1))
    """How many of the newest checkpoints stay; the last two always do, should one be damaged."""
    keep_best: int = field(default=0, validator=ge(0))
    """How many of the best by ``monitor`` stay besides; a step that is among them is saved at
    once, whatever ``every`` says."""
    monitor: str = "val/loss"
    """The metric that tells the best, at the steps that are validated or logged with it."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger ``monitor`` is better."""
    keep_every: Period | None = None
    """How often to save a milestone, which is never deleted."""
    save_final: bool = True
    """Whether the last step is saved, whatever ``every`` says; after a signal it always is."""
    contents: Literal["all", "model"] = "all"
    """What to save: all that a run needs to go on, or the model alone, which takes a third of the
    space with Adam, and cannot be resumed from."""
    asynchronous: bool = True
    """Whether a step that saves waits only for a copy in the host's memory, which is written
    beside the steps that follow. The last save is waited for in any case."""
    when_busy: Literal["wait", "skip"] = "wait"
    """What a save does that is due while the one before is still being written: wait for it, or be
    left out with a warning. Milestones, the best and the last step always wait."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What happens if the disk refuses a checkpoint: the run ends, or goes on with a warning; it
    ends with an error if the last one is refused. Earlier checkpoints are untouched either way."""
    folder: Path | None = None
    """Where checkpoints go, in ``<name of the run folder>/<run id>``; by default into the run
    folder."""
    allow_changes: list[str] = field(factory=list)
    """Settings that may differ from those of the checkpoint though they make the run another one:
    names such as ``run.seed``, ``data`` for the data itself, or patterns such as ``gpt.*``."""

    run_id: str = field(init=False, default="")
    """What tells this run's checkpoints from those of a namesake: what ``run-id`` holds in the run
    folder. Empty until the first start."""
    _measured: tuple[int, dict[str, float]] = field(init=False, factory=lambda: (-1, {}))
    _candidate: bool = field(init=False, default=False)
    _trains: bool = field(init=False, default=False)
    _record: dict[str, Any] | None = field(init=False, default=None)
    _writer: Any = field(init=False, default=None, repr=False)
    _void: list[Path] = field(init=False, factory=list)
    unsound: set[Path] = field(init=False, factory=set, repr=False)

    speaks_for_all = ("read_checkpoint",)

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        """Finish what a process that was killed had begun. Training it is: not just loading."""
        from fundamentallm_checkpoint import identity, leftovers, places

        self._trains, self._record = True, None
        self.run_id = identity.known(run.folder)
        if self.run_id:
            for home in {self.home(run), *places.of(run.folder)}:
                leftovers.recover(home)

    @hookimpl
    def read_checkpoint(self, run: Run) -> Snapshot | None:
        """Return the wanted or the newest sound snapshot of all instances."""
        from fundamentallm_checkpoint import resumption, siblings

        instances = siblings.of(run, type(self))
        for instance in instances.values():
            instance.settle(run)
        return resumption.read(instances, run, resumes=self._trains)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Make the folder ready, set an abandoned continuation aside, and see that there is room
        for a checkpoint, and leave to write it."""
        weights = run.model.state_dict()  # on every process: parts of it may have to be gathered
        if run.rank == 0:
            from fundamentallm_checkpoint import identity, places, preparation, siblings, store

            self.run_id = identity.settle(run.folder, self.run_id)
            places.note(run.folder, self.home(run))
            store.prepare(self.home(run))
            siblings.abandon(run, self)
            self.unsound = set()  # none of them is where it was
            siblings.warn(run, self)
            if not run.ending:
                preparation.check(self.home(run), run, weights, self.contents)

    @hookimpl
    def on_validation_end(self, run: Run, metrics: dict[str, float]) -> None:
        """Remember the metrics of this step; they may make it one of the best."""
        self._measure(run, metrics)

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """Remember the metrics of this step; so may they."""
        self._measure(run, metrics)

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        """Tell of a save that has come to its end, and save if it is due."""
        writer, progress, keep_every = self._writer, run.progress, self.keep_every
        if writer is None:
            self._writer = self._opened(run)
        elif writer.flight is not None:
            writer.collect(run, wait=run.ending)
        milestone = keep_every is not None and keep_every.due(progress)
        if self.every.due(progress) or milestone or run.ending or self._candidate:
            self._save_if_due(run, milestone=milestone)

    @hookimpl
    def on_rewind(self, run: Run) -> None:
        """Set the checkpoints of the steps aside that are void now."""
        self._measured, self._candidate = (-1, {}), False
        if run.rank == 0:
            from fundamentallm_checkpoint import leftovers, siblings

            for void in self._void:
                leftovers.remove_leftover(void)
            self._void, self.unsound = siblings.abandon(run, self), set()

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        """Wait for a save that is still under way."""
        if self._writer is not None:
            self._writer.close(run)
            self._writer = None
        from fundamentallm_checkpoint import advice

        advice.add(run, self)

    def home(self, run: Run) -> Path:
        """Return the folder that this instance's checkpoints of ``run`` are in."""
        from fundamentallm_checkpoint import store

        name = next(name for name, instance in run.plugins.items() if instance is self)
        return store.home_of(run.folder, name, self.folder, self.run_id)

    def rules(self) -> Rules:
        """Return what this instance keeps."""
        from fundamentallm_checkpoint.retention import Rules

        return Rules(
            keep_last=self.keep_last, keep_best=self.keep_best, monitor=self.monitor, mode=self.mode
        )

    def settle(self, run: Run) -> None:
        """Wait until what is being saved can be read."""
        if self._writer is not None:
            self._writer.collect(run, wait=True)

    def _measure(self, run: Run, metrics: dict[str, float]) -> None:
        """Remember what is known of this very step."""
        step, known = self._measured
        now = run.progress.step
        self._measured = now, (known if step == now else {}) | metrics
        if self.keep_best and self.monitor in metrics:
            self._candidate = True

    def _opened(self, run: Run) -> Writer:
        from fundamentallm_checkpoint import preparation
        from fundamentallm_checkpoint.saving import Writer

        pinned, goes_on = run.device.startswith("cuda"), self.on_save_error == "continue"
        writer = Writer(pinned=pinned, goes_on=goes_on)
        if run.ending or self.every.due(run.progress):  # then the save itself looks
            return writer
        held, home = run.snapshot(), self.home(run)  # on every process
        size = 0 if run.rank else preparation.measure(home, held, self.contents, goes_on=goes_on)
        writer.arena.reserve(size if self.asynchronous else 0)
        return writer

    def _save_if_due(self, run: Run, *, milestone: bool) -> None:
        from fundamentallm_checkpoint import identity

        if not self.run_id:  # not the first process, which has written it before the first step
            self.run_id = identity.known(run.folder)
        is_best = self._candidate and self._is_among_best(run)
        self._candidate = False
        final = run.ending and (self.save_final or run.signal is not None)
        tags = {
            "milestone": milestone,
            "final": run.ending and run.signal is None,
            "best": is_best,
        }
        if self.every.due(run.progress) or final or milestone or is_best:
            self._save(run, tuple(tag for tag, applies in tags.items() if applies))

    def _save(self, run: Run, tags: tuple[str, ...]) -> None:
        snapshot = run.snapshot()  # on every process: parts of it may have to be gathered
        writer = self._writer
        if run.rank or writer is None:
            return
        if writer.flight is not None and self.when_busy == "skip" and not (tags or run.ending):
            log.warning(
                "step %d is not saved: step %d is still being written",
                run.progress.step,
                writer.flight.job.draft.step,
            )
            return
        # Nothing changes any more while the last one is written: it needs no copy.
        beside = self.asynchronous and not run.ending
        writer.save(run, self._job(run, snapshot, tags), beside=beside)

    def _job(self, run: Run, snapshot: Snapshot, tags: tuple[str, ...]) -> Job:
        from fundamentallm_checkpoint import changes, contents, identity
        from fundamentallm_checkpoint.saving import Job

        self._record = self._record or changes.record(run)
        trained = {name for name, _ in run.model.named_parameters(remove_duplicate=False)}
        packed = contents.pack(snapshot | {"settings": self._record}, trained, self.contents)
        identity.restore(run, self.run_id, self.home(run))
        return Job(self.home(run), packed, self._draft(run, tags), self.rules())

    def _draft(self, run: Run, tags: tuple[str, ...] = ()) -> Manifest:
        from fundamentallm_checkpoint import identity

        step, metrics = self._measured
        found = metrics if step == run.progress.step else {}
        return identity.draft(run, self.run_id, metrics=found, tags=tags, contents=self.contents)

    def _is_among_best(self, run: Run) -> bool:
        from fundamentallm_checkpoint import retention, store

        draft = self._draft(run)
        known = [*store.sound(self.home(run), self.run_id), draft]
        if self._writer is not None and self._writer.flight is not None:
            known.append(self._writer.flight.job.draft)
        best = retention.ranked({m.step: m for m in known}.values(), self.rules())
        return draft in best[: self.keep_best]
