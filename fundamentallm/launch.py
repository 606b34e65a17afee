"""From settings to a finished run: the run folder, signals, and an end that says what happened."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fundamentallm import defaults, loop
from fundamentallm.errors import FundamentalError, OutOfMemoryError, PluginError, SettingsError
from fundamentallm.folder import locked, new_folder, write_record
from fundamentallm.host import blame, freeze, register
from fundamentallm.rng import seed_random
from fundamentallm.run import Run
from fundamentallm.settings import HOST, Composed, compose

if TYPE_CHECKING:
    from pluggy import PluginManager

log = logging.getLogger("fundamentallm")
ASKS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)


def train(
    settings: Path | str | Mapping[str, Any] | Composed,
    *,
    plugins: Sequence[object] = (),
    overrides: Iterable[str] = (),
    run_dir: Path | str | None = None,
    at: str | None = None,
) -> Run:
    """Train as ``settings`` say and return the finished run; raises a ``FundamentalError``.

    ``settings`` is a TOML file or the same as a dict; ``plugins`` are objects to use beside the
    listed ones; ``overrides`` are strings such as ``"run.length=100"``. ``run_dir`` starts that
    run or continues it, from its newest checkpoint or the one that ``at`` names (see ``load_run``);
    without it a new folder is made.
    """
    if not isinstance(settings, Composed):
        settings = compose(settings, overrides=overrides, plugins=plugins)
    run, registry = prepare(settings, run_dir)
    run.wanted_checkpoint = at
    with locked(run.folder), signals(run):
        try:
            with told(registry, settings.brought):
                run.hook.on_run_start(run=run)
                build(run)
                # Not before: settings that do not fit a run's checkpoints must not replace its own.
                write_record(run.folder, settings)
                loop.train(run)
            done = run.progress.closed and run.settings.length.reached(run.progress)
            run.outcome = "finished" if done else "interrupted" if run.signal else "stopped"
        except KeyboardInterrupt:
            run.signal, run.outcome = run.signal or signal.SIGINT, "interrupted"
        except BaseException as error:
            run.error = error
            raise
        finally:
            _end(run, registry, settings.brought)
    return run


def load_run(folder: Path | str, *, at: str = "latest") -> Run:
    """Rebuild a run from its folder, with the weights of its newest sound checkpoint, or of the one
    that ``at`` names: ``"best"``, ``"step-00000500"``. Nothing is trained or written."""
    composed = recorded(folder)
    run, registry = prepare(composed, folder)
    run.wanted_checkpoint = at
    with told(registry, composed.brought):
        build(run, weights_only=True)
    return run


def recorded(folder: Path | str, overrides: Iterable[str] = (), **choice: Any) -> Composed:
    """Compose the settings that a run folder records; ``choice`` is as in ``compose``."""
    path = Path(folder) / "settings.toml"
    if not path.is_file():
        raise SettingsError(f"{folder}: is not a run folder: it has no settings.toml")
    return compose(path, overrides=overrides, **choice)


def prepare(composed: Composed, folder: Path | str | None) -> tuple[Run, PluginManager]:
    """Make the run object, and its folder if none is named; bind the hooks; build nothing yet."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device: str = composed.run.device
    device = next(name for name, there in has.items() if there) if device == "auto" else device
    if not has[device]:
        raise SettingsError(f"run.device: there is no {device!r} device here")
    run = Run(composed.run, composed.plugins, Path(folder) if folder else new_folder(composed))
    run.device = device
    registry = register(HOST, composed, defaults.answers())
    run.tables = composed.tables
    run.bind = partial(freeze, HOST, registry, muted=set[str]())
    run.hook = run.bind()
    return run, registry


def build(run: Run, *, weights_only: bool = False) -> None:
    """Build data, tokenizer, model and optimizer, and restore the newest checkpoint, if any."""
    hook = run.hook
    run.data = hook.build_data(run=run)
    run.progress.epoch_samples = run.data.epoch_samples
    run.tokenizer = hook.build_tokenizer(run=run)
    seed_random(run.seed_for("model"))
    run.model = hook.build_model(run=run).to(run.device)
    hook.adapt_model(run=run)
    module = hook.checkpoint_activations(run=run, model=run.model)
    module = hook.compile_model(run=run, model=module)
    run.module = hook.distribute_model(run=run, model=module)
    run.parameters = list(run.model.parameters())
    run.optimizer = hook.build_optimizer(run=run)
    run.base_lrs = [group["lr"] for group in run.optimizer.param_groups]
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    if not held <= {id(parameter) for parameter in run.parameters}:
        raise SettingsError("the optimizer has parameters that are not in run.model")
    seed_random(run.seed_for("train"))
    snapshot = hook.read_checkpoint(run=run)
    if snapshot is not None:
        run.restore(snapshot, weights_only=weights_only)
    elif run.wanted_checkpoint or any((run.folder / "checkpoints").rglob("step-*/manifest.json")):
        raise SettingsError(f"{run.folder}: no listed plugin finds a checkpoint to go on from")
    elif (run.folder / "settings.toml").exists():
        log.warning("%s: there is no checkpoint: the run begins at step 0", run.folder)


@contextlib.contextmanager
def signals(run: Run) -> Iterator[None]:
    """Let SIGINT, SIGTERM, SIGUSR1 and ``max_time`` ask for the end at the next safe point;
    a SIGINT after that ends at once."""

    def ask(number: int, _: object) -> None:
        if run.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        # Time that is up is what a batch system warns of with SIGUSR1.
        run.signal = run.signal or (signal.SIGUSR1 if number == signal.SIGALRM else number)
        log.warning("%s: stopping at the next safe point", signal.Signals(number).name)

    # Explicitly, since a shell's background job inherits SIGINT as ignored.
    main, limit = threading.current_thread() is threading.main_thread(), run.settings.max_time
    before = {number: signal.signal(number, ask) for number in ASKS if main}
    if main and limit:
        signal.setitimer(signal.ITIMER_REAL, limit.seconds or 0)
    try:
        yield
    finally:
        if main and limit:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, old in before.items():
            signal.signal(number, old)


def _end(run: Run, registry: PluginManager, brought: Mapping[str, str]) -> None:
    try:
        with told(registry, brought):
            run.hook.on_train_end(run=run, outcome=run.outcome)
    except Exception as error:
        if run.error is None:
            raise
        log.error("besides: %s", error)  # noqa: TRY400 - the run's own error is what counts


@contextlib.contextmanager
def told(registry: PluginManager, brought: Mapping[str, str]) -> Iterator[None]:
    """Turn what a plugin raises into an error that names plugin, distribution and hook."""
    try:
        yield
    except FundamentalError:
        raise
    except Exception as error:
        # What torch says of a CPU or of MPS is a plain RuntimeError.
        said = any(text in str(error) for text in ("can't allocate memory", "out of memory"))
        if said or isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise OutOfMemoryError(f"out of memory: {error}; try a smaller batch size") from error
        blamed = blame(error, registry, brought)
        if blamed is None:
            raise
        raise PluginError(blamed) from error
