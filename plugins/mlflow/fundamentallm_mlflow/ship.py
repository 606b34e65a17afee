"""The process that ships: ``python -m fundamentallm_mlflow.ship FOLDER``.

It reads a request from its standard input, opens the store, answers with one line of JSON, and then
ships what the journal in FOLDER holds until the training process ends it or dies. Exit codes: 0 all
is shipped · 1 the store did not open · 3 the store took no more.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm_mlflow.journal import JournalReader, Marks

if TYPE_CHECKING:
    from fundamentallm_mlflow.store import Point, Store

POLL_SECONDS = 1.0
LONGEST_PAUSE = 30.0
ENOUGH = 900  # metrics in one batch, if no row holds more; MLflow takes a thousand

log = logging.getLogger("ship")


class Shipment:
    """What lies between the journal and the store."""

    def __init__(self, journal: Path, store: Store) -> None:
        self._reader = JournalReader(journal)
        self._store = store
        self._shipped = store.offset
        self._marks = Marks()
        self._rest: list[Point] = []
        self.last: dict[str, Any] = {}
        """The last ``start`` or ``end`` row."""

    def ship(self) -> None:
        """Send all that is in the journal by now. Raises what the store raises; the next call
        goes on with what was not taken."""
        while self._rest or self._load():
            self._store.take(self._rest)
            self._rest = []
            self._store.keep(self._reader.offset)

    def _load(self) -> bool:
        for row in self._reader.rows():
            if row["kind"] != "metrics":
                self.last = row
                continue
            news = self._marks.news(row)
            if self._reader.offset > self._shipped:
                self._rest += [(k, v, row["time"], row["step"]) for k, v in news.items()]
            if len(self._rest) >= ENOUGH:
                break
        return bool(self._rest)


def ship(shipment: Shipment, store: Store, parent: int, patience: float) -> int:
    """Ship until the training process is gone and all is in the store, or ``patience`` seconds
    after that; return the exit code."""
    pause, gone_at = 0.0, None
    while True:
        gone = _gone(parent, POLL_SECONDS + pause)
        if gone and gone_at is None:
            gone_at, pause = time.monotonic(), 0.0
        try:
            shipment.ship()
            if gone:
                store.end(shipment.last)
                return 0
            pause = 0.0
        except Exception:
            log.exception("the store takes nothing")
            if gone_at is not None and time.monotonic() - gone_at >= patience:
                return 3
            pause = min(LONGEST_PAUSE, 2 * pause + 1)
            if gone:
                time.sleep(min(pause, patience))


def main() -> int:
    """Run the process; see the module."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the training process hears them, and ends this one
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    # Whatever a library prints belongs into the log, not into the answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder = Path(sys.argv[1])
    request = json.loads(sys.stdin.buffer.readline())
    try:
        from fundamentallm_mlflow.store import Store

        store = Store(request, folder)
    except Exception as error:
        log.exception("the store did not open")
        _answer(answers, {"error": _reason(error)})
        return 1
    _answer(answers, {"run_id": store.run_id})
    os.nice(5)  # from here on the training comes first
    shipment = Shipment(folder / "journal.jsonl", store)
    return ship(shipment, store, request["parent"], request["end_seconds"])


def _gone(parent: int, seconds: float) -> bool:
    """Wait for the training process to close our input or to die, at most so long."""
    closed, _, _ = select.select([0], [], [], seconds)
    # Where it died, a worker process that it forked may still hold the other end of the input.
    return bool(closed) or os.getppid() != parent


def _answer(answers: Any, facts: dict[str, Any]) -> None:
    try:
        answers.write(json.dumps(facts) + "\n")
        answers.close()
    except OSError:
        log.warning("the training process is gone already")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:500]


if __name__ == "__main__":
    sys.exit(main())
