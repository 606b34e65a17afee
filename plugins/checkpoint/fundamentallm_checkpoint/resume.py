"""Find the checkpoint that a run continues from, and compare the run with it."""

from __future__ import annotations

import logging
import shlex
from typing import TYPE_CHECKING, Any

import attrs
import torch

from fundamentallm import DataError, PeerError, SettingsError, StorageError, command_line
from fundamentallm import Loaded as LoadedCheckpoint
from fundamentallm_checkpoint import run_id, settings_diff
from fundamentallm_checkpoint.storage import directory, manifest, retention, snapshot
from fundamentallm_checkpoint.storage.manifest import (
    ALL,
    Manifest,
    NewerFormatError,
    NoMemoryError,
    UnsoundError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fundamentallm import Run, Snapshot
    from fundamentallm_checkpoint import Checkpoint
    from fundamentallm_checkpoint.storage.retention import Rules

log = logging.getLogger("fundamentallm")


class NotResumableError(UnsoundError):
    """A sound checkpoint that a run cannot continue from: it holds the model only."""


@attrs.frozen(kw_only=True)
class LoadRequest:
    """Which checkpoint to load.

    ``name`` is ``"best"`` or the name of a checkpoint: that one and no other. ``"latest"`` or None
    is the newest that is sound and finite. Those of other runs than ``run`` are ignored. With
    ``resumes`` training continues from it, so one with the model only is not enough. With
    ``any_copy``, of several copies of the named step any sound one will do. ``unsound`` collects
    the folders that could not be used.
    """

    name: str | None = None
    rules: Rules
    run: str = ""
    any_copy: bool = False
    resumes: bool = True
    unsound: set[Path] = attrs.field(factory=set, eq=False)

    @property
    def any_will_do(self) -> bool:
        """Whether an older checkpoint may be taken instead."""
        return self.name in (None, "latest")


@attrs.frozen
class Loaded:
    """A checkpoint that was verified and read."""

    folder: Path
    manifest: Manifest
    snapshot: Snapshot


def load(homes: Iterable[Path], request: LoadRequest) -> Loaded | None:
    """Verify and read a checkpoint; None if there is none at all and none is asked for by name.

    Without a name, each newer one that is not sound or not finite is skipped with a warning.
    Raises ``StorageError`` if there are checkpoints, but none can be used: a run with damaged
    checkpoints must not silently start from step 0.
    """
    there, others = directory.split_by_owner(
        [folder for home in homes for folder in directory.folders(home)], request.run
    )
    if others:
        log.warning(
            "%d checkpoints of another run than %s are ignored, among them %s",
            len(others),
            request.run,
            others[0],
        )
    problems = []
    for folder in _candidates(there, request):
        try:
            return _load(folder, request)
        # An older one would lose steps, while the user can make this one readable.
        except (NewerFormatError, NoMemoryError) as error:
            raise StorageError(f"{folder}: {error}") from None
        except UnsoundError as error:
            request.unsound.add(folder.absolute())
            problems.append(f"{folder}: {error}")
            # One with the model only is no damage: another instance may save such ones on purpose.
            if request.any_will_do and not isinstance(error, NotResumableError):
                log.warning("checkpoint %s; trying the next one", problems[-1])
    if not problems:
        return None
    raise StorageError("\n".join(["no sound checkpoint to continue from:", *problems]))


def read(instances: dict[str, Checkpoint], run: Run, *, resumes: bool) -> Snapshot | None:
    """Return the wanted or the newest sound snapshot of all instances, or None.

    With ``resumes`` training continues from it: changed settings are logged, and those that would
    make it another run are a ``SettingsError``.
    """
    known = run_id.read_id(run.folder)
    for instance in instances.values():
        instance.run_id = known
    # Without an id, a shared ``folder`` holds no checkpoints of this run yet.
    own = [one.home(run) for one in instances.values() if known or not one.folder]
    homes = {home.absolute(): home for home in [*own, *run_id.homes(run.folder)]}.values()
    first, *_ = instances.values()
    # "best" is a matter of ``monitor`` and ``mode``: those of an instance that keeps the best.
    judge = next((one for one in instances.values() if one.keep_best), first)
    request = LoadRequest(
        name=run.wanted_checkpoint,
        rules=judge.rules(),
        run=known,
        # The first process has chosen the step, perhaps from another folder than the first.
        any_copy=run.rank > 0,
        resumes=resumes,
    )
    for instance in instances.values():
        instance.unsound = request.unsound
    loaded = load(homes, request)
    if loaded is None:
        for instance in instances.values():
            _warn_of_other_runs(instance.folder, run, known)
        return None
    for instance in instances.values():
        # If the run folder has lost its id, it gets that of its checkpoints.
        instance.run_id = loaded.manifest.run
    # Added by this plugin when it saved; the core's snapshot has no such key.
    record = loaded.snapshot.pop("settings")
    if resumes:
        _compare(instances, run, loaded, record)
    log.info("loaded %s", loaded.folder)
    facts = loaded.manifest
    about = LoadedCheckpoint(loaded.folder, facts.step, facts.metrics, facts.digest)
    return loaded.snapshot | {"loaded": about}


def all_instances(run: Run, cls: type[Checkpoint]) -> dict[str, Checkpoint]:
    """Return all instances of the plugin; ``checkpoint`` comes first, whatever the list's order."""
    found = {name: one for name, one in run.plugins.items() if type(one) is cls}
    return {name: found[name] for name in sorted(found, key=lambda n: (n != "checkpoint", n))}


def supersede(run: Run, instance: Checkpoint) -> list[Path]:
    """Move later checkpoints than the run's step out of an instance's folder.

    The first instance does the same in folders that no instance uses any more. Returns the new
    folders.
    """
    instances, step = all_instances(run, type(instance)).values(), run.progress.step
    moved = [directory.supersede(instance.home(run), step, instance.run_id)]
    if instance is next(iter(instances)):
        used = {one.home(run).absolute() for one in instances}
        former = [home for home in run_id.homes(run.folder) if home.absolute() not in used]
        moved += [directory.supersede(home, step, instance.run_id, used=False) for home in former]
    return [path for path in moved if path is not None]


def warn_if_not_resumable(run: Run, instance: Checkpoint) -> None:
    """Warn, once for all instances, if none saves what a run needs to continue."""
    instances = list(all_instances(run, type(instance)).values())
    if instance is instances[0] and all(one.contents != ALL for one in instances):
        log.warning("all checkpoints will hold the model only: the run cannot be resumed")


def add_advice(run: Run, instance: Checkpoint) -> None:
    """Add to the error of a failed run its newest usable checkpoint and the command to resume."""
    # Settings or data have to be corrected first; resuming would repeat the error.
    if run.error is None or isinstance(run.error, SettingsError | DataError):
        return
    # A process that has lost another one may be the only one left that can give the advice.
    if run.rank and not isinstance(run.error, PeerError):
        return
    home = instance.home(run)
    found = directory.sound(home, instance.run_id) if instance.run_id else []
    steps = sorted(one.step for one in found if one.finite and one.contents == ALL)
    folders = [home / manifest.folder_name(step) for step in steps]
    useful = [folder for folder in folders if folder.absolute() not in instance.unsound]
    if useful:
        newest = shlex.quote(str(useful[-1]))
        command = command_line("resume", run.folder)
        run.error.add_note(f"the newest finite checkpoint is {newest}; resume with: {command}")


def _candidates(there: list[Path], request: LoadRequest) -> list[Path]:
    """Return the checkpoints to try, the newest first; of one step, complete ones first."""
    known = {folder: _manifest(folder) for folder in there}
    # One without a readable manifest counts as complete, so that it is tried and reported.
    complete = {folder: facts is None or facts.contents == ALL for folder, facts in known.items()}
    there = sorted(there, key=lambda f: (manifest.step_of(f.name) or 0, complete[f]), reverse=True)
    if request.any_will_do:
        return there
    if request.name == "best":
        usable = [m for f, m in known.items() if m and (complete[f] or not request.resumes)]
        best = retention.ranked(usable, request.rules)
        chosen = [f for f in there if best and known[f] == best[0]]
        missing = f"no checkpoint has the metric {request.rules.monitor}, so none is the best"
    else:
        # No step has twenty digits, and ``int`` raises an error for some thousands of them.
        name = str(request.name).removeprefix("step-")
        step = int(name) if name.isdecimal() and len(name) < 20 else None
        chosen = [f for f in there if manifest.step_of(f.name) == step]
        missing = f"there is no checkpoint {request.name!r}"
    if not chosen:
        # Two instances may have saved the same step.
        listed = ", ".join(dict.fromkeys(f.name for f in there)) or "none"
        raise StorageError(f"{missing} (checkpoints: {listed})")
    return chosen if request.any_copy else chosen[:1]


def _load(folder: Path, request: LoadRequest) -> Loaded:
    facts = manifest.read(folder)
    if request.resumes and facts.contents != ALL:
        raise NotResumableError("it holds the model only, so no run can continue from it")
    if not facts.finite and request.any_will_do:
        raise UnsoundError(
            "it holds NaN or infinity in its weights or moments; to load it all the same, name"
            f" {folder.name}"
        )
    # Last: this reads and hashes every byte, and the checks above read only the manifest.
    found = snapshot.read(folder, facts)
    if not facts.finite:
        log.warning("checkpoint %s holds NaN or infinity in its weights or moments", folder)
    return Loaded(folder, facts, found)


def _manifest(folder: Path) -> Manifest | None:
    try:
        return manifest.read(folder)
    except UnsoundError:
        return None


def _compare(
    instances: dict[str, Checkpoint], run: Run, loaded: Loaded, record: dict[str, Any]
) -> None:
    """Log what has changed since the checkpoint; raise ``SettingsError`` for what must not."""
    allowed = [pattern for one in instances.values() for pattern in one.allow_changes]
    # The setting that allows a change is not itself worth a line.
    own = {f"{name}.allow_changes" for name in instances}
    found = [change for change in settings_diff.between(record, run) if change.key not in own]
    before, now = loaded.manifest.data[:12], run.data.fingerprint[:12]
    if loaded.manifest.data != run.data.fingerprint:
        found.append(settings_diff.Change("data", before, now, binds=True))
    # Compared only with such a change: without one, the core reports what does not fit.
    misfit = _misfit(run, loaded.snapshot) if any(change.binds for change in found) else ""
    settings_diff.check(found, allowed, f"{next(iter(instances))}.allow_changes", misfit)
    for change in found if run.rank == 0 else ():
        log.log(logging.WARNING if change.binds else logging.INFO, "%s", change)


def _misfit(run: Run, snapshot: Snapshot) -> str:
    """Return why the snapshot cannot be loaded into this model and optimizer; empty if it can."""
    saved, now = (_shapes(state) for state in (snapshot["model"], run.model.state_dict()))
    differing = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if differing:
        name = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        return (
            f"the checkpoint's weights do not fit the model: {name} has"
            f" {saved.get(name, 'no tensor')} in the checkpoint and {now.get(name, 'no tensor')} in"
            f" the model{more}"
        )
    kind, optimizer = snapshot["optimizer_class"], str(type(run.optimizer))
    if kind != optimizer:
        return f"the checkpoint has the state of {kind}, which {optimizer} cannot load"
    return ""


def _shapes(state: dict[str, Any]) -> dict[str, str]:
    return {
        name: f"shape {[*value.shape]}"
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def _warn_of_other_runs(folder: Path | None, run: Run, known: str) -> None:
    """Warn of checkpoints that may be those of this run, should its run folder have been lost."""
    if folder is None or known:
        return
    place = folder / run.folder.name
    for found in run_id.other_runs(place):
        log.warning(
            "the checkpoints in %s belong to another run and are ignored, since %s is a new run"
            " folder. To continue that run, use its run folder; if that is lost, write %s into %s"
            " first",
            place / found,
            run.folder,
            found,
            run.folder / run_id.FILE,
        )
