"""Upload the journal of a run folder to its MLflow runs in one store."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm_mlflow.journal import JournalReader, LastSteps, Timeline, starts_and_rewinds
from fundamentallm_mlflow.sync_state import SyncedRun, SyncState
from fundamentallm_mlflow.worker.client import Names
from fundamentallm_mlflow.worker.registry import Candidates, register
from fundamentallm_mlflow.worker.resume import decide
from fundamentallm_mlflow.worker.system_metrics import measurements

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fundamentallm_mlflow.worker.client import Client, Point

BATCH_POINTS = 900  # end a batch there: a row may add a hundred more, and MLflow takes a thousand
RECENT_ROWS = 64  # rows whose metrics a checkpoint may still need: it is announced after its row
OF_TRAINING = ("train/", "optim/", "perf/")

log = logging.getLogger("worker")


class Sync:
    """All MLflow runs of a run folder in one store."""

    def __init__(self, folder: Path, store: str, experiment: str, client: Client) -> None:
        self._journal = folder / "journal.jsonl"
        self._target = (store, experiment)
        self._state = SyncState(folder)
        self._client = client
        self._uploaded_files: set[Path] = set()
        turns = starts_and_rewinds(self._journal)
        starts = [(offset, row) for offset, row in turns if row["kind"] == "start"]
        known = {offset for run in self._state.runs for offset in run.starts}
        new = [(offset, row) for offset, row in starts if offset not in known]
        # Before the new starts, which continue the last run where this store has it.
        if self._state.runs and not self._is_here(self._state.runs[-1]):
            self._move(dict(starts), may_create=not new)
        for offset, row in new:
            self._attach(offset, row)
        indices = range(len(self._state.runs))
        self._uploads = [self._upload_of(i) for i in indices if self._is_due(i)]

    @property
    def run(self) -> SyncedRun:
        """The MLflow run of the last start."""
        return self._state.runs[-1]

    @property
    def is_complete(self) -> bool:
        """Whether the store has every row and the end state."""
        return self.run.closed and self.run.uploaded >= self._journal.stat().st_size

    def upload(self) -> None:
        """Upload all rows of the journal. After an error, the next call continues there."""
        while len(self._uploads) > 1:  # runs that a later start has left
            self._uploads[0].upload()
            self._uploads.pop(0).close()
        self._uploads[0].upload()

    def close(self) -> None:
        """Set the end state of the last run, whose rows are all uploaded."""
        self._uploads[0].close()

    def upload_samples(self, run_folder: Path) -> None:
        """Upload the new texts in ``samples/`` of the run folder."""
        root = run_folder / "samples"
        for path in sorted(root.rglob("*.txt")) if root.is_dir() else ():
            if path not in self._uploaded_files:
                self._client.add_file(
                    self.run.run_id, path, str(path.parent.relative_to(run_folder))
                )
                self._uploaded_files.add(path)

    def _attach(self, offset: int, start: Mapping[str, Any]) -> None:
        last = self._state.runs[-1] if self._state.runs else None
        tags: dict[str, str] = {}
        if last is None or not self._is_here(last):
            run = self._new(offset, start, history=True)
        else:
            decision, reason = decide(self._journal, offset, start)
            if decision == "same":
                run = last
            elif decision == "new":
                run, tags = self._new(offset, start, history=False), {"continues": last.run_id}
            else:
                run = self._new(offset, start, history=True)
                tags = {
                    "forked_from": last.run_id,
                    "forked_at": str(start["step"]),
                    "fork_reason": reason,
                }
        self._client.describe(run.run_id, start, tags)
        # Saved after the calls: a repeated call has the same result, a forgotten one would not.
        run.closed = False
        if run is last:
            run.starts.append(offset)
        else:
            self._state.runs.append(run)
        self._state.save()

    def _move(self, starts: Mapping[int, Mapping[str, Any]], *, may_create: bool) -> None:
        """Continue in this store, because the last run is in another one or was deleted.

        Use the run that this store already has for the same start, else create one with all rows.
        """
        runs, last = self._state.runs, self._state.runs[-1]
        twins = [one for one in runs if one.starts[0] == last.starts[0] and self._is_here(one)]
        if not (twins or may_create):
            return
        first = last.starts[0]
        run = twins[-1] if twins else self._new(first, starts[first], history=last.history)
        for offset in last.starts:
            if not twins or offset not in run.starts:
                self._client.describe(run.run_id, starts[offset], {})
        run.starts, run.closed = list(last.starts), False
        self._state.runs = [one for one in runs if one is not run] + [run]
        self._state.save()

    def _new(self, offset: int, start: Mapping[str, Any], *, history: bool) -> SyncedRun:
        run_id = self._client.run_for(start)
        return SyncedRun(
            run_id,
            self._client.experiment_id,
            *self._target,
            starts=[offset],
            history=history,
            uploaded=0 if history else offset,
        )

    def _is_here(self, run: SyncedRun) -> bool:
        return (run.store, run.experiment) == self._target and self._client.has(run.run_id)

    def _is_due(self, index: int) -> bool:
        run = self._state.runs[index]
        end = self._state.end_of(index)
        if end is None:
            return True
        return end > run.starts[0] and not run.closed and self._is_here(run)

    def _upload_of(self, index: int) -> RunUpload:
        return RunUpload(self._journal, self._state, index, self._client)


class RunUpload:
    """The upload of one MLflow run's part of the journal.

    Every row from the first on is read again by each new process: which metrics are new and which
    checkpoint is the best depends on all of them.
    """

    def __init__(self, journal: Path, state: SyncState, index: int, client: Client) -> None:
        self._state, self._client = state, client
        self._run = state.runs[index]
        self._start, self._end = self._run.starts[0], state.end_of(index)
        self._folder = journal.parent
        first = 0 if self._run.history else self._start
        self._reader = JournalReader(journal, first, self._end)
        self._history = Timeline(journal, self._start)
        self._last_steps, self._names = LastSteps(), Names()
        self._points: list[Point] = []
        self._others: list[dict[str, Any]] = []
        self._recent: dict[int, list[Point]] = {}
        self._last: dict[str, Any] = {}
        self._candidates = Candidates()
        self._uploads_checkpoints = False

    def upload(self) -> None:
        """Upload the rows that are not in the store."""
        while self._points or self._others or self._load():
            self._client.take(self._run.run_id, self._points)
            self._points = []
            while self._others:
                self._send(self._others[0])
                # Only now: after an error the next call sends this row again.
                self._others.pop(0)
            # After the calls: a kill before this line sends rows twice, which changes nothing.
            self._run.uploaded = self._reader.offset
            self._state.save()
        self._upload_system()

    def close(self) -> None:
        """Set the end state from the last ``start`` or ``end`` row."""
        self._client.end(self._run.run_id, self._last)
        self._client.accepted(register, self._client, self._run.run_id, self._candidates)
        self._run.closed = True
        self._run.uploaded = self._reader.offset
        self._state.save()

    def _upload_system(self) -> None:
        points: list[Point] = []
        done = offset = self._run.system_uploaded
        for offset, more in measurements(self._folder, done, self._start, self._end):
            points += more
            if len(points) >= BATCH_POINTS:
                self._take_system(points, offset)
                points = []
        if offset != self._run.system_uploaded:
            self._take_system(points, offset)

    def _take_system(self, points: list[Point], offset: int) -> None:
        self._client.take(self._run.run_id, points)
        self._run.system_uploaded = offset
        self._state.save()

    def _load(self) -> bool:
        """Read rows until a batch is full; return whether there is anything to upload."""
        for offset, row in self._reader.rows():
            is_new, is_own = offset >= self._run.uploaded, offset >= self._start
            if is_own:
                self._candidates.add(row)
            if row["kind"] == "metrics":
                self._load_metrics(offset, row, is_new=is_new)
            elif is_own and row["kind"] in ("start", "end"):
                self._last = row
                self._uploads_checkpoints = row.get("upload", self._uploads_checkpoints)
            elif is_own and is_new:
                self._others.append(row)
            if len(self._points) >= BATCH_POINTS:
                break
        return bool(self._points or self._others)

    def _load_metrics(self, offset: int, row: dict[str, Any], *, is_new: bool) -> None:
        # Names and last steps follow from all rows before, also from those that are uploaded.
        named = [(self._names.of(key), key) for key in row["metrics"]]
        if offset < self._start and not self._history.is_valid(offset, row["step"]):
            return
        new = self._last_steps.new_metrics(row)
        points = [(n, new[key], row["time"], row["step"]) for n, key in named if key in new]
        if is_new:
            self._points += points
        # The model of a checkpoint gets the results of its step, not the course of the training.
        of_model = [point for point in points if not point[0].startswith(OF_TRAINING)]
        if of_model:
            self._recent[row["step"]] = of_model
            while len(self._recent) > RECENT_ROWS:
                del self._recent[next(iter(self._recent))]

    def _send(self, row: dict[str, Any]) -> None:
        run_id = self._run.run_id
        if row["kind"] == "rewind":
            text = f"steps {row['step'] + 1} to {row['left']} are void: the run went back"
            self._client.tag(run_id, {f"rewind.{row['left']}": text})
        elif row["kind"] == "checkpoint":
            self._client.add_model(run_id, row, self._recent.get(row["step"], []))
            if self._uploads_checkpoints:
                folder = Path(row["folder"])
                self._client.add_file(run_id, folder, f"checkpoints/{folder.name}")
