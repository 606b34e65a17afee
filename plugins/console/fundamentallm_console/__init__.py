"""Write a log of the run for people, to a file and to the terminal."""

from __future__ import annotations

import logging
import sys
import traceback
from typing import TYPE_CHECKING

from fundamentallm import field, hookimpl, matches, plugin

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fundamentallm import Outcome, Run

FILE = "train.log"
log = logging.getLogger("fundamentallm")


class LogFile(logging.FileHandler):
    """A log file that stops after the first failed write, with one warning."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))

    def handleError(self, _: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Remove this handler after a failed write, and warn."""
        log.removeHandler(self)
        log.warning("%s is not written any more: %s", self.baseFilename, sys.exc_info()[1])


@plugin
class Console:
    """Log events, metrics and warnings to ``train.log`` in the run folder and to the terminal.

    The file gets all lines. The terminal gets no rows of metrics if another plugin shows progress.
    All lines go through the logger ``fundamentallm``, so its level, filters and handlers apply.
    """

    role = "observer"

    metrics: list[str] = field(factory=lambda: ["*"])
    """Which metrics a row shows: names, or patterns such as ``"train/*"``."""

    _handlers: list[logging.Handler] = field(init=False, factory=list)
    _level: int = field(init=False, default=logging.NOTSET)
    # ``on_log`` gets whether its row has the metrics of a validation, but not which ones they are.
    _of_validation: frozenset[str] = field(init=False, default=frozenset())

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Open the log; log the size of the model, the device, the length and the plugins."""
        if run.rank:
            return
        self._open(run)
        progress, settings = run.progress, run.settings
        parameters = sum(parameter.numel() for parameter in run.parameters)
        begin = f"continues at step {progress.step}" if progress.step else "starts"
        log.info(
            "run %s %s: %s parameters on %s, for %s, seed %d",
            run.folder.name,
            begin,
            f"{parameters:,}",
            run.device,
            settings.length,
            settings.seed,
        )
        log.info("plugins: %s", ", ".join(run.plugins))

    @hookimpl
    def on_validation_end(self, run: Run, metrics: dict[str, float]) -> None:
        """Log the metrics of the validation."""
        self._of_validation = frozenset(metrics)
        if self._handlers:
            log.info("step %d: validation: %s", run.progress.step, _listed(metrics.items()))

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float], validated: bool) -> None:
        """Log the metrics of the row, except those of a validation."""
        logged = self._of_validation if validated else ()
        rest = [
            (name, value)
            for name, value in metrics.items()
            if name not in logged and matches(name, self.metrics)
        ]
        if self._handlers and rest:
            self._say_row(run, f"step {run.progress.step}: {_listed(rest)}")

    @hookimpl
    def on_checkpoint_saved(self, folder: Path) -> None:
        """Log the path of the checkpoint."""
        if self._handlers:
            log.info("saved %s", folder)

    @hookimpl
    def on_train_end(self, run: Run, outcome: Outcome) -> None:
        """Log the outcome, and close the log."""
        if run.rank:
            return
        if not self._handlers:  # the run failed before on_train_start
            self._open(run)
        why = f" ({run.stop_reason})" if outcome == "stopped" else ""
        counts = run.progress
        if run.begun:
            log.info(
                "%s%s at step %d, after %.1f s of training and %s tokens",
                outcome,
                why,
                counts.step,
                counts.seconds,
                f"{counts.tokens:,}",
            )
        else:  # the step of a resumed run is not known before its checkpoint is loaded
            log.info("%s while starting, before any step", outcome)
        if run.error is not None:
            # Only to the file: the error is raised to the caller, so the terminal shows it anyway.
            lines = [f"{type(run.error).__name__}: {run.error}\n"]
            text = "".join([*lines, *traceback.format_exception(run.error)]).rstrip()
            self._handlers[0].handle(_record(logging.ERROR, text))
        self._close()

    def _say_row(self, run: Run, text: str) -> None:
        # A hook without implementations is false. Without a progress bar the terminal shows rows.
        if run.hook.on_progress:  # type: ignore[truthy-function]
            self._handlers[0].handle(_record(logging.INFO, text))
        else:
            log.info("%s", text)

    def _open(self, run: Run) -> None:
        # Without handlers, Python's logging would drop all lines below warnings.
        shown = [] if log.hasHandlers() else [logging.StreamHandler()]
        self._handlers = [LogFile(run.folder / FILE), *shown]
        self._level = log.level
        if not log.isEnabledFor(logging.INFO):
            log.setLevel(logging.INFO)
        for handler in self._handlers:
            log.addHandler(handler)

    def _close(self) -> None:
        for handler in self._handlers:
            log.removeHandler(handler)
            handler.close()
        self._handlers = []
        log.setLevel(self._level)


def _record(level: int, text: str) -> logging.LogRecord:
    return log.makeRecord(log.name, level, __file__, 0, text, (), None)


def _listed(metrics: Iterable[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {value:,.5g}" for name, value in metrics)
