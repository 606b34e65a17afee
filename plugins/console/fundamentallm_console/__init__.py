"""A log of the run for people: a line for what happens, in a file and on the terminal."""

from __future__ import annotations

import logging
import sys
import traceback
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from fundamentallm import field, hookimpl, plugin

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fundamentallm import Outcome, Run

FILE = "train.log"
log = logging.getLogger("fundamentallm")


class LogFile(logging.FileHandler):
    """Appends what is logged to a file; a disk that refuses it is told once, not at every line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))

    def handleError(self, _: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Write no more to the file, and say so."""
        log.removeHandler(self)
        log.warning("%s is not written any more: %s", self.baseFilename, sys.exc_info()[1])


@plugin
class Console:
    """Write what happens to ``train.log`` in the run folder, and show it on the terminal.

    The file gets every line, and all warnings. The terminal gets the same; but where another
    plugin shows the progress, it is spared the rows of metrics. Lines go through the logger
    ``fundamentallm``: what a program does with that one holds here too.
    """

    role = "observer"

    metrics: list[str] = field(factory=lambda: ["*"])
    """Which metrics a row shows: names, or patterns such as ``"train/*"``."""

    _handlers: list[logging.Handler] = field(init=False, factory=list)
    _level: int = field(init=False, default=logging.NOTSET)
    _validated: frozenset[str] = field(init=False, default=frozenset())

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        """Open the log, and tell what begins."""
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
        """Tell the metrics of the validation."""
        self._validated = frozenset(metrics)
        if self._handlers:
            log.info("step %d: validation: %s", run.progress.step, _listed(metrics.items()))

    @hookimpl
    def on_log(self, run: Run, metrics: dict[str, float]) -> None:
        """Tell the other metrics of the row."""
        rest = [(name, value) for name, value in metrics.items() if self._shows(name)]
        self._validated = frozenset()
        if self._handlers and rest:
            self._say_row(run, f"step {run.progress.step}: {_listed(rest)}")

    @hookimpl
    def on_checkpoint_saved(self, folder: Path) -> None:
        """Tell where it is."""
        if self._handlers:
            log.info("saved %s", folder)

    @hookimpl
    def on_train_end(self, run: Run, outcome: Outcome) -> None:
        """Tell how it ended, and close the log."""
        if run.rank:
            return
        if not self._handlers:  # the run failed before its first step: tell that at least
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
        else:  # a run that was to be continued does not know its step yet
            log.info("%s while starting, before any step", outcome)
        if run.error is not None:
            # To the file alone: whoever started the run hears of the error by itself, but not of
            # the lines that led to it and to its causes.
            lines = [f"{type(run.error).__name__}: {run.error}\n"]
            text = "".join([*lines, *traceback.format_exception(run.error)]).rstrip()
            self._handlers[0].handle(_record(logging.ERROR, text))
        self._close()

    def _shows(self, name: str) -> bool:
        return name not in self._validated and any(fnmatchcase(name, p) for p in self.metrics)

    def _say_row(self, run: Run, text: str) -> None:
        # A hook that nobody hears is false: no bar then, and the rows are all there is to see.
        if run.hook.on_progress:  # type: ignore[truthy-function]
            self._handlers[0].handle(_record(logging.INFO, text))
        else:
            log.info("%s", text)

    def _open(self, run: Run) -> None:
        # A program without any logging set up would see nothing of all this.
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
