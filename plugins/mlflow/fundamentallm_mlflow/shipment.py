"""What lies between the journal and the MLflow runs of a run folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm_mlflow.journal import JournalReader, Marks, Timeline, turns_of
from fundamentallm_mlflow.ledger import Entry, Ledger
from fundamentallm_mlflow.names import Names
from fundamentallm_mlflow.registry import Candidates, register
from fundamentallm_mlflow.resumption import way
from fundamentallm_mlflow.system import seen

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fundamentallm_mlflow.store import Point, Store

ENOUGH = 900  # metrics in one batch, if no row holds more; MLflow takes a thousand
RECENT = 64  # rows whose metrics a checkpoint may still ask for: it is announced later
OF_TRAINING = ("train/", "optim/", "perf/")

log = logging.getLogger("ship")


class Shipping:
    """All MLflow runs of a run folder that are in one store."""

    def __init__(self, folder: Path, place: str, experiment: str, store: Store) -> None:
        self._journal = folder / "journal.jsonl"
        self._place = (place, experiment)
        self._ledger = Ledger(folder)
        self._store = store
        self._sent: set[Path] = set()
        starts = [(o, row) for o, row in turns_of(self._journal) if row["kind"] == "start"]
        entries = self._ledger.entries
        known = {offset for entry in entries for offset in entry.starts}
        fresh = [(offset, row) for offset, row in starts if offset not in known]
        if entries and not self._is_here(entries[-1]):
            self._move(dict(starts), may_make=not fresh)
        for offset, row in fresh:
            self._attach(offset, row)
        entries = self._ledger.entries
        self._shipments = [self._shipment(i) for i in range(len(entries)) if self._is_due(i)]

    @property
    def entry(self) -> Entry:
        """The MLflow run that the last start writes into."""
        return self._ledger.entries[-1]

    @property
    def is_complete(self) -> bool:
        """Whether the store has every row, and the end state."""
        return self.entry.closed and self.entry.shipped >= self._journal.stat().st_size

    def ship(self) -> None:
        """Send all that is in the journal by now. Raises what the store raises; the next call
        goes on with what was not taken."""
        while len(self._shipments) > 1:  # runs that a later start has left
            self._shipments[0].ship()
            self._shipments.pop(0).close()
        self._shipments[0].ship()

    def close(self) -> None:
        """Set the end state of the last run, for which all has been sent."""
        self._shipments[0].close()

    def add_samples(self, run_folder: Path) -> None:
        """Send the texts of the run folder that are new."""
        root = run_folder / "samples"
        for path in sorted(root.rglob("*.txt")) if root.is_dir() else ():
            if path not in self._sent:
                self._store.add_file(
                    self.entry.run_id, path, str(path.parent.relative_to(run_folder))
                )
                self._sent.add(path)

    def _attach(self, offset: int, start: Mapping[str, Any]) -> None:
        last = self._ledger.entries[-1] if self._ledger.entries else None
        tags: dict[str, str] = {}
        if last is None or not self._is_here(last):
            entry = self._new(offset, start, history=True)
        else:
            decided, why = way(self._journal, offset, start)
            if decided == "same":
                entry = last
            elif decided == "new":
                entry, tags = self._new(offset, start, history=False), {"continues": last.run_id}
            else:
                entry = self._new(offset, start, history=True)
                tags = {
                    "forked_from": last.run_id,
                    "forked_at": str(start["step"]),
                    "fork_reason": why,
                }
        self._store.describe(entry.run_id, start, tags)
        # Only now: what got no answer is done again, and each part of it comes out the same.
        entry.closed = False
        if entry is last:
            entry.starts.append(offset)
        else:
            self._ledger.entries.append(entry)
        self._ledger.keep()

    def _move(self, starts: Mapping[int, Mapping[str, Any]], *, may_make: bool) -> None:
        """Go on in this store though the last run is in another, or was deleted: with what this
        one has of it already, or else with a new run of the same rows."""
        entries, last = self._ledger.entries, self._ledger.entries[-1]
        twins = [e for e in entries if e.starts[0] == last.starts[0] and self._is_here(e)]
        if not (twins or may_make):
            return
        first = last.starts[0]
        entry = twins[-1] if twins else self._new(first, starts[first], history=last.history)
        for offset in last.starts:
            if not twins or offset not in entry.starts:
                self._store.describe(entry.run_id, starts[offset], {})
        entry.starts, entry.closed = list(last.starts), False
        self._ledger.entries = [e for e in entries if e is not entry] + [entry]
        self._ledger.keep()

    def _new(self, offset: int, start: Mapping[str, Any], *, history: bool) -> Entry:
        run_id = self._store.run_for(start)
        return Entry(
            run_id,
            self._store.experiment_id,
            *self._place,
            starts=[offset],
            history=history,
            shipped=0 if history else offset,
        )

    def _is_here(self, entry: Entry) -> bool:
        is_near = (entry.place, entry.experiment) == self._place
        return is_near and self._store.has(entry.run_id)

    def _is_due(self, index: int) -> bool:
        entry = self._ledger.entries[index]
        end = self._ledger.end_of(index)
        if end is None:
            return True
        return end > entry.starts[0] and not entry.closed and self._is_here(entry)

    def _shipment(self, index: int) -> Shipment:
        return Shipment(self._journal, self._ledger, index, self._store)


class Shipment:
    """One MLflow run's part of the journal."""

    def __init__(self, journal: Path, ledger: Ledger, index: int, store: Store) -> None:
        self._ledger, self._store = ledger, store
        self._entry = ledger.entries[index]
        self._start, self._end = self._entry.starts[0], ledger.end_of(index)
        self._folder = journal.parent
        first = 0 if self._entry.history else self._start
        self._reader = JournalReader(journal, first, self._end)
        self._before = Timeline(journal, self._start)
        self._marks, self._names = Marks(), Names()
        self._points: list[Point] = []
        self._others: list[dict[str, Any]] = []
        self._recent: dict[int, list[Point]] = {}
        self._last: dict[str, Any] = {}
        self._candidates = Candidates()
        self._upload = False

    def ship(self) -> None:
        """Send what has not been sent."""
        while self._points or self._others or self._load():
            self._store.take(self._entry.run_id, self._points)
            self._points = []
            while self._others:
                self._send(self._others[0])
                self._others.pop(0)
            self._entry.shipped = self._reader.offset
            self._ledger.keep()
        self._ship_system()

    def close(self) -> None:
        """Set the end state that the rows tell."""
        self._store.end(self._entry.run_id, self._last)
        self._store.offers(register, self._store, self._entry.run_id, self._candidates)
        self._entry.closed = True
        self._entry.shipped = self._reader.offset
        self._ledger.keep()

    def _ship_system(self) -> None:
        points: list[Point] = []
        offset = self._entry.system
        for offset, more in seen(self._folder, self._entry.system, self._start, self._end):
            points += more
            if len(points) >= ENOUGH:
                self._take_system(points, offset)
                points = []
        if offset != self._entry.system:
            self._take_system(points, offset)

    def _take_system(self, points: list[Point], offset: int) -> None:
        self._store.take(self._entry.run_id, points)
        self._entry.system = offset
        self._ledger.keep()

    def _load(self) -> bool:
        for offset, row in self._reader.rows():
            is_new, is_mine = offset >= self._entry.shipped, offset >= self._start
            if is_mine:
                self._candidates.see(row)
            if row["kind"] == "metrics":
                self._load_metrics(offset, row, is_new=is_new)
            elif is_mine and row["kind"] in ("start", "end"):
                self._last = row
                self._upload = row.get("upload", self._upload)
            elif is_mine and is_new:
                self._others.append(row)
            if len(self._points) >= ENOUGH:
                break
        return bool(self._points or self._others)

    def _load_metrics(self, offset: int, row: dict[str, Any], *, is_new: bool) -> None:
        named = [(self._names.of(key), key) for key in row["metrics"]]
        if offset < self._start and not self._before.counts(offset, row["step"]):
            return
        news = self._marks.news(row)
        points = [(n, news[key], row["time"], row["step"]) for n, key in named if key in news]
        if is_new:
            self._points += points
        found = [point for point in points if not point[0].startswith(OF_TRAINING)]
        if found:
            self._recent[row["step"]] = found
            while len(self._recent) > RECENT:
                del self._recent[next(iter(self._recent))]

    def _send(self, row: dict[str, Any]) -> None:
        run_id = self._entry.run_id
        if row["kind"] == "rewind":
            self._store.tag(
                run_id,
                {
                    f"rewind.{row['left']}": f"steps {row['step'] + 1} to "
                    f"{row['left']} are void: the run went back"
                },
            )
        elif row["kind"] == "checkpoint":
            self._store.add_model(run_id, row, self._recent.get(row["step"], []))
            if self._upload:
                folder = Path(row["folder"])
                self._store.add_file(run_id, folder, f"checkpoints/{folder.name}")
