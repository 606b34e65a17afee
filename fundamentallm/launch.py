"""From settings to a finished run: the run folder, the record in it, signals, and the end."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fundamentallm import defaults, loop
from fundamentallm.dispatch import Trace, freeze
from fundamentallm.errors import FundamentalError, OutOfMemoryError, PluginError, SettingsError
from fundamentallm.plugins import Composed, Registry, compose, register
from fundamentallm.record import new_folder, write_record
from fundamentallm.run import Run

if TYPE_CHECKING:
    from fundamentallm.hookspecs import Outcome

log = logging.getLogger("fundamentallm")


def train(
    settings: Path | str | Mapping[str, Any] | Composed,
    *,
    plugins: Sequence[object] = (),
    overrides: Iterable[str] = (),
    run_dir: Path | str | None = None,
    trace: Trace | None = None,
) -> Run:
    """Train as ``settings`` say and return the finished run.

    ``settings`` is a TOML file or the same as a dict; ``plugins`` are objects to use beside the
    listed ones; ``overrides`` are strings such as ``"run.length=100"``. ``run_dir`` starts that
    run or continues it; without it a new folder is made. Raises a ``FundamentalError``.
    """
    started = time.perf_counter()
    composed = settings if isinstance(settings, Composed) else compose(
        settings, overrides=overrides, plugins=plugins)  # fmt: skip
    folder = Path(run_dir) if run_dir is not None else new_folder(composed)
    run, registry = prepare(composed, folder, trace)
    write_record(folder, composed)
    outcome: Outcome = "failed"
    try:
        with signals(run), told(registry):
            build(run)
            loop.train(run, started)
            outcome = "stopped" if run.stop_reason else "finished"
            outcome = "interrupted" if run.signal else outcome
    except KeyboardInterrupt:
        run.signal, outcome = signal.SIGINT, "interrupted"
    except BaseException as error:
        run.error = error
        raise
    finally:
        run.outcome = outcome
        with told(registry):
            run.hook.on_train_end(run=run, outcome=outcome)
    return run


def load_run(folder: Path | str, *, at: str | None = None) -> Run:
    """Rebuild a run from its folder, with the weights of its newest sound checkpoint.

    ``at`` names another: ``"best"``, ``"latest"`` or ``"step-00000500"``. Nothing is trained.
    """
    run, registry = prepare(recorded(folder), Path(folder), None)
    run.wanted_checkpoint = at or "latest"
    with told(registry):
        build(run, weights_only=True)
    return run


def recorded(folder: Path | str, overrides: Iterable[str] = ()) -> Composed:
    """Compose the settings that a run folder records."""
    path = Path(folder) / "settings.toml"
    if not path.is_file():
        raise SettingsError(f"{folder}: is not a run folder: it has no settings.toml")
    return compose(path, overrides=overrides)


def prepare(composed: Composed, folder: Path, trace: Trace | None) -> tuple[Run, Registry]:
    """Make the run object and bind its hooks; nothing is built yet."""
    run = Run(composed.run, composed.plugins, folder)
    run.name = composed.run.name or folder.name
    run.device = _device(composed.run.device)
    registry = register(composed, defaults.answers())
    run.hook = freeze(registry, trace)
    return run, registry


def build(run: Run, *, weights_only: bool = False) -> None:
    """Build data and model, and put back what the newest checkpoint holds, if there is one."""
    loop.build(run)
    snapshot = run.hook.read_checkpoint(run=run)
    if snapshot is not None:
        run.restore(snapshot, weights_only=weights_only)
    elif run.wanted_checkpoint:
        raise SettingsError(f"{run.folder}: there is no checkpoint to load")


@contextlib.contextmanager
def signals(run: Run) -> Iterator[None]:
    """Let SIGINT and SIGTERM ask for the end at the next safe point; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, _: object) -> None:
        if run.signal is not None:
            raise KeyboardInterrupt
        run.signal = number
        log.warning("%s: stopping at the next safe point", signal.Signals(number).name)

    # Explicitly, since a shell's background job inherits SIGINT as ignored.
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def told(registry: Registry) -> Iterator[None]:
    """Turn what a plugin raises into an error that names the plugin."""
    try:
        yield
    except FundamentalError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemoryError(f"out of memory: {error}; try a smaller batch size") from error
    except Exception as error:
        name, hook = blame(error, registry)
        if name is None:
            raise
        raise PluginError(f"plugin {name!r} failed in {hook}: {error!r}") from error


def blame(error: BaseException, registry: Registry) -> tuple[str | None, str]:
    """Find the innermost hook implementation of a plugin in an error's traceback."""
    codes = {}
    for caller in (getattr(registry.hook, hook) for hook in vars(registry.hook)):
        for impl in getattr(caller, "get_hookimpls", list)():
            code = getattr(impl.function, "__code__", None)
            codes[code] = (impl.plugin_name, caller.name)
    found: tuple[str | None, str] = (None, "")
    trace = error.__traceback__
    while trace is not None:
        name, hook = codes.get(trace.tb_frame.f_code, (None, ""))
        found = (name, hook) if name not in (None, "core") else found
        trace = trace.tb_next
    return found


def _device(wanted: str) -> str:
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return "cuda" if has["cuda"] else "mps" if has["mps"] else "cpu"
    if not has[wanted]:
        raise SettingsError(f"run.device: there is no {wanted!r} device here")
    return wanted
