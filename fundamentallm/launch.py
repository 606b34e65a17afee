"""From settings to a finished run: the run folder, signals, and an end that says what happened."""

from __future__ import annotations

import contextlib
import logging
import signal
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fundamentallm import defaults, loop
from fundamentallm.checks import Checks
from fundamentallm.errors import (
    DataError,
    FundamentalError,
    OutOfMemoryError,
    PeerError,
    PluginError,
    SettingsError,
    StorageError,
    lost_a_process,
    ran_out_of_memory,
    why_lost,
)
from fundamentallm.folder import SETTINGS, checkpoints, environment, failed_to_start, is_run
from fundamentallm.folder import settings as recorded_settings
from fundamentallm.host import blame, freeze, register
from fundamentallm.local_code import code_changes, local_files
from fundamentallm.process import signals
from fundamentallm.record import locked, new_folder, write_ending, write_record, write_settings
from fundamentallm.run import Run
from fundamentallm.settings import HOST, Composed, answering, compose, find_plugins
from fundamentallm.threads import computing_threads

if TYPE_CHECKING:
    from pluggy import PluginManager

    from fundamentallm.data import Data

log = logging.getLogger("fundamentallm")


def train(
    settings: Path | str | Mapping[str, Any] | Composed,
    *,
    plugins: Sequence[object] = (),
    overrides: Iterable[str] = (),
    run_dir: Path | str | None = None,
    at: str | None = None,
) -> Run:
    """Train as ``settings`` say and return the finished run; raises a ``FundamentalError``.

    ``settings`` is a TOML file or the same as a dict; ``plugins`` are objects to use in addition to
    the listed ones; ``overrides`` are strings such as ``"run.length=100"``. ``run_dir`` starts that
    run or continues it, from its newest checkpoint or the one that ``at`` names (see ``load_run``);
    without it a new folder is made.
    """
    if not isinstance(settings, Composed):
        settings = compose(settings, overrides=overrides, plugins=plugins)
    run, registry = prepare(settings, run_dir)
    run.wanted_checkpoint = at
    with _prepared(run, registry, settings, is_new=run_dir is None):
        try:
            with naming_the_plugin(registry, settings.brought):
                run.hook.on_run_start(run=run)
                build(run)
                # Not before: settings that do not fit a run's checkpoints must not replace its own.
                run.from_first(lambda: write_record(run.folder, settings, run.progress.step))
                _begin(run)
                loop.train(run)
            done = run.progress.closed and run.settings.length.reached(run.progress)
            run.outcome = "finished" if done else "interrupted" if run.signal else "stopped"
        except KeyboardInterrupt:
            # Not raised: a run that a signal ended is no failure, and the caller gets it.
            run.signal, run.outcome = run.signal or signal.SIGINT, "interrupted"
        except BaseException as error:
            run.error = error
            raise
        finally:
            # Within the lock: no other process may continue the run before its end is written.
            _end(run, registry, settings)
    return run


@contextlib.contextmanager
def _prepared(
    run: Run, registry: PluginManager, settings: Composed, *, is_new: bool
) -> Iterator[None]:
    """Meet the other processes, make and lock the run folder, and receive signals."""
    with contextlib.ExitStack() as stack:
        with naming_the_plugin(registry, settings.brought):
            stack.enter_context(run.hook.join_processes(run=run))
            if is_new:
                run.folder = Path(run.from_first(lambda: str(new_folder(settings))))
            # The lock comes first: all that follows reads or writes the folder of the run.
            run.from_first(lambda: stack.enter_context(locked(run.folder)))
        stack.enter_context(signals(run))
        stack.enter_context(computing_threads(run))
        if run.rank == 0:
            _announce(run, settings)
        yield


def _begin(run: Run) -> None:
    """Mark the run as begun: from now on, all processes act on a signal at the same step."""
    run.begun = True
    if run.world_size > 1:
        run.signal = None  # ``received_signal`` remains, and the next safe point sends it


def _announce(run: Run, settings: Composed) -> None:
    """Say what starts, also where no listed plugin shows it, and which local code has changed."""
    log.info("training for %s in %s", run.settings.length, run.folder)
    for line in code_changes(run.folder):
        log.warning("%s", line)
    if answering(run.plugins, "read_checkpoint") is None:
        # A program that gives a dict gets the trained model as an object.
        level = logging.WARNING if settings.source.path else logging.INFO
        log.log(level, "nothing will be saved: no listed plugin saves checkpoints")


def load_run(  # noqa: PLR0913 - what the command line offers
    folder: Path | str,
    *,
    at: str = "latest",
    overrides: Iterable[str] = (),
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    device: str | None = None,
    train: bool = False,
) -> Run:
    """Rebuild a run from its folder and load a checkpoint. Nothing is trained or written.

    ``at`` names the checkpoint: ``"latest"`` (the newest sound one), ``"best"`` or
    ``"step-00000500"``. ``overrides``, ``add`` and ``remove`` change the recorded settings.
    ``run.progress`` and ``run.loaded`` are those of the checkpoint.

    Without ``train`` there is no optimizer, the training data may be missing, and the run may have
    been recorded on another machine: if its device is missing here, another one is used; listed
    plugins that are not installed are left out if they only observe. Both log a line. ``device``
    chooses a device instead, and must be there.
    """
    folder, overrides = Path(folder), list(overrides)
    if not train:
        remove = [*remove, *(name for name in _missing_observers(folder) if name not in remove)]
    composed = recorded(folder, overrides, add=add, remove=remove)
    chosen = any(text.partition("=")[0].strip() == "run.device" for text in overrides)
    if device is not None:
        composed.run.device = device  # type: ignore[assignment]  # prepare() checks it
    elif not train and not chosen and not _devices().get(composed.run.device, True):
        log.warning("run.device: there is no %r device here; using another", composed.run.device)
        composed.run.device = "auto"
    run, registry = prepare(composed, folder)
    run.wanted_checkpoint, run.training = at, train
    with naming_the_plugin(registry, composed.brought):
        build(run)
    return run


def recorded(folder: Path | str, overrides: Iterable[str] = (), **choice: Any) -> Composed:
    """Compose the settings that a run folder records; ``choice`` is as in ``compose``."""
    if not is_run(Path(folder)):
        raise SettingsError(f"{folder}: is not a run folder: it has no {SETTINGS}")
    return compose(Path(folder) / SETTINGS, overrides=overrides, **choice)


def prepare(composed: Composed, folder: Path | str | None) -> tuple[Run, PluginManager]:
    """Make the run object and bind the hooks; build nothing yet."""
    has, device = _devices(), composed.run.device
    chosen: str = next(name for name, there in has.items() if there) if device == "auto" else device
    if not has.get(chosen):
        known = ", ".join(name for name, there in has.items() if there)
        text = f"there is no {chosen!r} device here (known: auto, {known})"
        # Where it is an argument of ``load_run``, no file states it.
        stated = composed.source.values.get(HOST.own, {}).get("device") == chosen
        place = f"{composed.source.origin((HOST.own, 'device')).place}: " if stated else ""
        raise SettingsError(f"{place}run.device: {text}")
    run = Run(composed.run, composed.plugins, Path(folder) if folder else None)
    run.device = chosen
    registry = register(HOST, composed, defaults.answers())
    run.tables = composed.tables
    run.checks = Checks(registry, composed.brought)
    run.checks.shared.unchecked.update(run.checks.first_calls())
    run.bind = partial(freeze, HOST, registry, shared=run.checks.shared)
    run.hook = run.bind()
    run.edits_once = len(registry.hook.edit_gradients.get_hookimpls()) == 1
    return run, registry


def build(run: Run) -> None:
    """Build data, tokenizer, model and, to train, the optimizer; restore a checkpoint if any."""
    hook = run.hook
    run.data = _built_data(run)
    run.tokenizer = hook.build_tokenizer(run=run)
    # What the data source drew must not change the initial weights.
    run.generators.seed(run.seed_for("model"))
    run.model = run.module = hook.build_model(run=run).to(run.device)
    hook.adapt_model(run=run)
    if run.training:
        module = hook.checkpoint_activations(run=run, model=run.model)
        module = hook.compile_model(run=run, model=module)
        run.module = hook.distribute_model(run=run, model=module)
    # Only now: the hooks above may add and replace parameters.
    run.parameters = list(run.model.parameters())
    if run.training:
        _build_optimizer(run)
    # What follows must not depend on how many random numbers the model has drawn.
    run.generators.seed(run.seed_for("start"))
    _restore(run)


def _build_optimizer(run: Run) -> None:
    run.optimizer = run.hook.build_optimizer(run=run)
    # Kept, since ``lr_factor`` replaces the rates of the groups in every step.
    run.base_lrs = [group["lr"] for group in run.optimizer.param_groups]
    # A checkpoint stores the optimizer's state by the names that parameters have in the model.
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    if not held <= {id(parameter) for parameter in run.parameters}:
        raise SettingsError("the optimizer has parameters that are not in run.model")


def _restore(run: Run) -> None:
    snapshot = run.read_checkpoint()
    if snapshot is not None:
        run.restore(snapshot, weights_only=not run.training)
    # To start at step 0 would in time replace the checkpoints that no plugin reads.
    elif run.wanted_checkpoint or checkpoints(run.folder):
        raise SettingsError(f"{run.folder}: no listed plugin finds a checkpoint to continue from")
    elif is_run(run.folder) and not failed_to_start(run.folder):
        log.warning("%s: there is no checkpoint: the run starts at step 0", run.folder)


class MissingData:
    """Stands for data that cannot be built where none is needed; its use raises the reason."""

    epoch_samples = None
    fingerprint = ""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        text = str(self._error) if isinstance(self._error, DataError) else repr(self._error)
        raise MissingDataError(f"run.data.{name} is needed: {text}") from self._error


class MissingDataError(DataError, AttributeError):
    """An attribute of data that could not be built; ``getattr`` with a default takes that."""


def _built_data(run: Run) -> Data:
    found: list[Data] = []
    try:
        # The first process makes the files that it keeps of the data; the others find them.
        run.from_first(lambda: found.append(run.hook.build_data(run=run)))
        data = found[0] if found else run.hook.build_data(run=run)
    except Exception as error:
        if run.training:
            raise
        return cast("Data", MissingData(error))
    run.progress.epoch_samples = data.epoch_samples
    return data


def _devices() -> dict[str, bool]:
    """Return which kinds of device this machine has, the fastest first."""
    return {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }


def _missing_observers(folder: Path) -> list[str]:
    """Return the listed plugins that only observe and cannot be found here; log each."""
    tables, installed = recorded_settings(folder), find_plugins()
    # From the record: the class of a plugin that is missing cannot be asked.
    roles = environment(folder).get("roles")
    roles, names = roles if isinstance(roles, dict) else {}, []
    for entry in tables.get("plugins", []):
        name = Path(entry).stem if entry.endswith(".py") else entry
        wanted = str(tables.get(name, {}).get("plugin", entry))
        there = Path(wanted).is_file() if wanted.endswith(".py") else wanted in installed
        known = HOST.known.get(wanted)
        if not there and roles.get(name, known and known.role) == "observer":
            log.warning("plugin %r is not installed; it only observes and is left out", name)
            names.append(name)
    return names


def _end(run: Run, registry: PluginManager, settings: Composed) -> None:
    _close_stream(run)
    try:
        with naming_the_plugin(registry, settings.brought):
            run.hook.on_train_end(run=run, outcome=run.outcome)
    except Exception as error:
        if run.error is None:
            run.outcome, run.error = "failed", error
            raise
        # Not raised: the run's own error is what counts.
        log.error("another error, while the run ended: %s", error)  # noqa: TRY400
    finally:
        if run.rank == 0:
            _record_ending(run, settings)


def _close_stream(run: Run) -> None:
    """Close the data stream, so that no loader's worker outlives the training."""
    try:
        run.close_stream()
    except Exception as error:  # noqa: BLE001 - it must not hide how the run ended
        log.warning("the data stream could not be closed: %r", error)


def _record_ending(run: Run, settings: Composed) -> None:
    """Write how the run ended; a run that could not be continued keeps the record it had."""
    is_new = not is_run(run.folder) or failed_to_start(run.folder)
    try:
        if not run.begun and is_new:
            write_settings(run.folder, settings)
        if run.begun or is_new:
            write_ending(run)
    except StorageError as error:
        log.warning("how the run ended is not recorded: %s", error)


@contextlib.contextmanager
def naming_the_plugin(registry: PluginManager, brought: Mapping[str, object]) -> Iterator[None]:
    """Turn what a plugin raises into an error that names plugin, distribution and hook."""
    try:
        yield
    except FundamentalError:
        raise
    except Exception as error:
        if ran_out_of_memory(error):
            raise OutOfMemoryError(f"out of memory: {error}; try a smaller batch size") from error
        if lost_a_process(error):
            text = "another process of the run has ended, or no longer answers"
            raise PeerError(f"{text}; its own message says why ({why_lost(error)})") from error
        blamed = blame(error, registry, brought) or _local_cause(error, registry, brought)
        if blamed is None:
            raise
        raise PluginError(blamed) from error


def _local_cause(
    error: Exception, registry: PluginManager, brought: Mapping[str, object]
) -> str | None:
    """Return which local plugin file raised an error outside of its hooks: in its model, say."""
    files = {
        file: name
        for name, plugin in registry.list_name_plugin()
        if getattr(brought.get(name), "kind", None) == "file"
        for file in local_files([plugin])
    }
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        name = files.get(Path(frame.filename).resolve())
        if name is not None:
            where = f"{frame.filename}:{frame.lineno}"
            # The error of a loader's worker contains the worker's traceback.
            text, what = str(error).strip(), f"{error!r}, at {where}"
            if "\n" in text:
                what = f"{type(error).__name__}, at {where}:\n{text}"
            return f"plugin {name!r} ({brought[name]}) failed in {frame.name}: {what}"
    return None
