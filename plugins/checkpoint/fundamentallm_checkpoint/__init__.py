"""Durable, verified checkpoints, and the way back from them."""

from __future__ import annotations

import hashlib
import logging
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fundamentallm import Period, field, ge, hookimpl, plugin

if TYPE_CHECKING:
    from fundamentallm import Run, Snapshot
    from fundamentallm_checkpoint.manifest import Manifest
    from fundamentallm_checkpoint.retention import Rules

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
    """How many of the best by ``monitor`` stay besides; a validation that is among them is saved
    at once, whatever ``every`` says."""
    monitor: str = "val/loss"
    """The metric that tells the best."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger ``monitor`` is better."""
    keep_every: Period | None = None
    """How often to save a milestone, which is never deleted."""
    save_final: bool = True
    """Whether the last step is saved, whatever ``every`` says; after a signal it always is."""
    folder: Path | None = None
    """Where checkpoints go, in ``<name of the run folder>/<run id>``; by default into the run
    folder."""

    run_id: str = field(init=False, default="")
    """What tells this run's checkpoints from those of a namesake: what ``run-id`` holds in the run
    folder. Empty until the first start."""
    _measured: tuple[int, dict[str, float]] = field(init=False, factory=lambda: (-1, {}))
    _candidate: bool = field(init=False, default=False)

    speaks_for_all = ("read_checkpoint",)

    @hookimpl
    def read_checkpoint(self, run: Run) -> Snapshot | None:
        """Return the wanted or the newest sound snapshot of all instances."""
        from fundamentallm_checkpoint import identity, store

        siblings, run_id = self._siblings(run), identity.known(run.folder)
        for instance in siblings:
            instance.run_id = run_id
        own = [instance.home(run) for instance in siblings if run_id or not instance.folder]
        homes = dict.fromkeys([*own, *store.homes_below(run.folder / "checkpoints")])
        judge = next((i for i in siblings if i.keep_best), siblings[0])
        loaded = store.load(homes, run.wanted_checkpoint, judge.rules(), run_id)
        if loaded is None:
            for instance in siblings:
                instance.warn_of_namesakes(run)
            return None
        for instance in siblings:
            instance.run_id = loaded.manifest.run
        log.info("loaded %s", loaded.folder)
        if loaded.manifest.data != run.data.fingerprint:
            log.warning("the data are not those that %s was trained on", loaded.folder)
        return loaded.snapshot

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Make the folder ready: remove leftovers, set an abandoned continuation aside."""
        if run.rank == 0:
            from fundamentallm_checkpoint import identity, store

            self.run_id = identity.settle(run.folder, self.run_id)
            store.prepare(self.home(run), run.progress.step, self.run_id)

    @hookimpl
    def on_validation_end(self, run: Run, metrics: dict[str, float]) -> None:
        """Remember the metrics of this step; they may make it one of the best."""
        self._measure(run, metrics)
        self._candidate = self.keep_best > 0 and self.monitor in metrics

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """Remember the metrics of this step, for the manifest."""
        self._measure(run, metrics)

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        """Save if it is due, tell it, then delete what need not stay."""
        progress, keep_every = run.progress, self.keep_every
        milestone = keep_every is not None and keep_every.due(progress)
        if self.every.due(progress) or milestone or run.ending or self._candidate:
            self._save_if_due(run)

    def home(self, run: Run) -> Path:
        """Return the folder that this instance's checkpoints of ``run`` are in."""
        home = run.folder / "checkpoints"
        if self.folder:  # one folder for the runs of many: their names may well be the same
            home = self.folder / run.folder.name / self.run_id
        name = next(name for name, instance in run.plugins.items() if instance is self)
        return home if name == "checkpoint" else home / name

    def rules(self) -> Rules:
        """Return what this instance keeps."""
        from fundamentallm_checkpoint.retention import Rules

        return Rules(
            keep_last=self.keep_last,
            keep_best=self.keep_best,
            monitor=self.monitor,
            mode=self.mode,
        )

    def warn_of_namesakes(self, run: Run) -> None:
        """Tell of checkpoints that may be those of a run folder that was lost."""
        from fundamentallm_checkpoint import identity

        if self.folder is None or self.run_id:
            return
        place = self.folder / run.folder.name
        for found in identity.namesakes(place):
            log.warning("the checkpoints in %s are another run's and are ignored: %s is a new one's"
                        " folder. To continue that run, use its folder; if that is lost, write %s"
                        " into %s first",
                        place / found, run.folder, found, run.folder / identity.FILE)  # fmt: skip

    def _siblings(self, run: Run) -> list[Checkpoint]:
        """Return all instances, the one named ``checkpoint`` first, whatever the list's order."""
        found = [(n != "checkpoint", n, p) for n, p in run.plugins.items() if type(p) is type(self)]
        return [instance for *_, instance in sorted(found, key=lambda one: one[:2])]

    def _measure(self, run: Run, metrics: dict[str, float]) -> None:
        """Remember what is known of this very step."""
        step, known = self._measured
        now = run.progress.step
        self._measured = now, (known if step == now else {}) | metrics

    def _at_milestone(self, run: Run) -> bool:
        return self.keep_every is not None and self.keep_every.due(run.progress)

    def _save_if_due(self, run: Run) -> None:
        from fundamentallm_checkpoint import identity

        if not self.run_id:  # not the first process, which has written it before the first step
            self.run_id = identity.known(run.folder)
        is_best = self._candidate and self._is_among_best(run)
        self._candidate = False
        final = run.ending and (self.save_final or run.signal is not None)
        tags = {
            "milestone": self._at_milestone(run),
            "final": run.ending and run.signal is None,
            "best": is_best,
        }
        due = self.every.due(run.progress) or final or tags["milestone"] or is_best
        if due:
            self._save(run, tuple(tag for tag, applies in tags.items() if applies))

    def _save(self, run: Run, tags: tuple[str, ...]) -> None:
        from fundamentallm_checkpoint import publication, store

        snapshot = run.snapshot()  # on every process: parts of it may have to be gathered
        if run.rank:
            return
        draft, home = self._draft(run, tags), self.home(run)
        folder = publication.publish(home, snapshot, draft, partial(run.report, "saving"))
        run.hook.on_checkpoint_saved(run=run, folder=folder)
        store.prune(home, self.rules(), self.run_id)

    def _draft(self, run: Run, tags: tuple[str, ...] = ()) -> Manifest:
        from fundamentallm_checkpoint.manifest import Manifest

        step, metrics = self._measured
        settings = run.folder / "settings.toml"
        known = hashlib.sha256(settings.read_bytes()).hexdigest() if settings.is_file() else ""
        return Manifest(
            step=run.progress.step,
            run=self.run_id,
            created=time.time(),
            settings=known,
            data=run.data.fingerprint,
            metrics=metrics if step == run.progress.step else {},
            tags=tags,
        )

    def _is_among_best(self, run: Run) -> bool:
        from fundamentallm_checkpoint import retention, store

        draft = self._draft(run)
        best = retention.ranked([*store.sound(self.home(run), self.run_id), draft], self.rules())
        return draft in best[: self.keep_best]
