"""Processes that user code forks or spawns: they inherit nothing, and the end of a run does not wait."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fundamentallm import Batch, Data, FundamentalError, Progress, field, hookimpl, plugin
from fundamentallm.testing import TinyRun, TinySamples
from fundamentallm_mlflow import Mlflow

if TYPE_CHECKING:
    from fundamentallm import Run

# Enough for a busy machine, and far longer than the test needs if the worker gets the request to end.
LIMITS = {"start_seconds": 120.0, "end_seconds": 45.0, "plot": False, "system_seconds": 0.0}
TOO_LATE = "the store did not take the last rows in time"


@plugin
class LoaderData:
    """Tiny samples that a DataLoader with worker processes brings."""

    workers: int
    """Number of worker processes."""
    context: str
    """How they start."""
    kept: bool = False
    """Whether the data keeps its loader, so that its processes outlive the run."""

    @hookimpl
    def build_data(self, run: Run) -> Data:
        return LoaderSamples(self)


class LoaderSamples(TinySamples):
    """The loader, and with it its processes, lives as long as the iterator, or is kept."""

    def __init__(self, settings: LoaderData) -> None:
        super().__init__(4, "cpu")
        self.settings = settings
        self.kept = self.loader() if settings.kept else None

    def loader(self) -> Any:
        from torch.utils.data import DataLoader, TensorDataset

        return DataLoader(
            TensorDataset(*self.batch(range(16)).data),
            batch_size=4,
            num_workers=self.settings.workers,
            multiprocessing_context=self.settings.context,
            persistent_workers=True,
        )

    def batches(self, progress: Progress) -> Iterator[Batch]:
        loader = self.kept or self.loader()
        while True:
            for inputs, targets in loader:
                yield Batch((inputs, targets), 4, 4, 4)

    def workers(self) -> list[Any]:
        """Return the processes of the loader that is kept."""
        iterator: Any = self.kept and self.kept._iterator
        return iterator._workers if iterator else []


@plugin
class EndsIn:
    """Ends the run in its third step, in one of three ways."""

    way: str

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if run.progress.step == 3 and self.way == "failed":
            raise RuntimeError("broken on purpose")
        if run.progress.step == 3 and self.way == "interrupted":
            os.kill(os.getpid(), signal.SIGTERM)


WAYS = [("finished", "FINISHED"), ("failed", "FAILED"), ("interrupted", "KILLED")]
# Each way with one kind of workers, and each kind in one way; the rest with the slow tests.
QUICK = {("finished", 4, "fork"), ("failed", 1, "fork"), ("interrupted", 1, "spawn")}
ENDS = [
    pytest.param(
        workers,
        context,
        *way,
        marks=[] if (way[0], workers, context) in QUICK else [pytest.mark.slow],
        id=f"{way[0]}-{workers}-{context}",
    )
    for workers, context in [(1, "fork"), (4, "fork"), (1, "spawn")]
    for way in WAYS
]


@pytest.mark.parametrize(("workers", "context", "way", "status"), ENDS)
def test_a_run_with_loader_workers_has_its_end_state_in_the_store(
    look: Any,
    tiny_run: TinyRun,
    caplog: pytest.LogCaptureFixture,
    workers: int,
    context: str,
    way: str,
    status: str,
) -> None:
    name = f"loader {workers} {context} {way}"
    parts = [
        Mlflow(experiment=name, **LIMITS),
        LoaderData(workers=workers, context=context),
        EndsIn(way=way),
    ]
    try:
        tiny_run(*parts, length=4)
    except FundamentalError as error:
        assert way == "failed"
        assert "broken on purpose" in str(error)
    assert look.run(name).info.status == status
    assert TOO_LATE not in caplog.text


@pytest.mark.parametrize(
    ("workers", "context", "way", "status"),
    [
        *((1, "fork", *end) for end in WAYS),
        (4, "fork", *WAYS[0]),
        pytest.param(1, "spawn", *WAYS[0], marks=pytest.mark.slow),
        *(pytest.param(4, "spawn", *end, marks=pytest.mark.slow) for end in WAYS),
    ],
)
def test_loader_workers_that_outlive_the_run_delay_no_end_and_have_none_of_its_files_open(
    look: Any,
    tiny_run: TinyRun,
    caplog: pytest.LogCaptureFixture,
    workers: int,
    context: str,
    way: str,
    status: str,
) -> None:
    name = f"kept loader {workers} {context} {way}"
    data, ends = LoaderData(workers=workers, context=context, kept=True), EndsIn(way=way)
    seen = Sees()
    try:
        tiny_run(Mlflow(experiment=name, **LIMITS), data, ends, seen, length=4)
    except FundamentalError as error:
        assert way == "failed"
        assert "broken on purpose" in str(error)
    seconds = time.monotonic() - seen.ended
    assert look.run(name).info.status == status
    assert TOO_LATE not in caplog.text
    assert len(seen.alive) == workers
    assert seconds < LIMITS["end_seconds"]
    assert [each for each in seen.inherited if each] == []


@plugin
class Sees:
    """Notes at the end of the run which workers of the loader live, and what they have open."""

    alive: list[Any] = field(init=False, factory=list)
    inherited: list[set[str]] = field(init=False, factory=list)
    ended: float = field(init=False, default=0.0)

    @hookimpl(tryfirst=True)
    def on_train_end(self, run: Run) -> None:
        self.ended = time.monotonic()
        samples: Any = run.data
        ours = {*worker_pipes(run), str(run.folder.resolve() / ".lock")}
        ours.add(str(run.folder.resolve() / "mlflow" / "journal.jsonl"))
        assert ours <= open_files(os.getpid())
        self.alive = [one for one in samples.workers() if one.is_alive()]
        self.inherited = [ours & open_files(one.pid) for one in self.alive]


def open_files(pid: int) -> set[str]:
    """Return what the descriptors of a process refer to."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.add(str(link.readlink()))
        except FileNotFoundError:
            continue
    return found


def worker_pipes(run: Run) -> list[str]:
    """Return the pipes to and from the upload worker, as /proc names them."""
    process: Any = run.plugins["mlflow"]._worker._process  # type: ignore[attr-defined]
    links = [Path(f"/proc/self/fd/{one.fileno()}") for one in (process.stdin, process.stdout)]
    return [str(link.readlink()) for link in links]


@plugin
class Forks:
    """Starts a process of its own that outlives the run."""

    context: str
    process: Any = None
    inherited: set[str] | None = None

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if self.process is None:
            own = {name for name in open_files(os.getpid()) if "pipe:" in name}
            child: Any = multiprocessing.get_context(self.context)
            self.process = child.Process(target=time.sleep, args=(600,), daemon=True)
            self.process.start()
            pipes = set(worker_pipes(run))
            assert pipes <= own
            journal = run.folder.resolve() / "mlflow" / "journal.jsonl"
            self.inherited = self.wait_for(pipes | {str(journal)})

    def wait_for(self, ours: set[str]) -> set[str]:
        """Return which of our files the process has open; it closes them as its first act."""
        until = time.monotonic() + 60
        while (found := ours & open_files(self.process.pid)) and time.monotonic() < until:
            time.sleep(0.05)
        return found


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_a_process_of_user_code_inherits_neither_pipes_nor_the_journal_and_delays_no_end(
    look: Any, tiny_run: TinyRun, caplog: pytest.LogCaptureFixture, context: str
) -> None:
    forks = Forks(context=context)
    try:
        tiny_run(Mlflow(experiment=f"forks {context}", **LIMITS), forks)
        assert forks.process.is_alive()
        assert forks.inherited == set()
        assert look.run(f"forks {context}").info.status == "FINISHED"
        assert TOO_LATE not in caplog.text
    finally:
        forks.process.kill()
        forks.process.join()


@plugin
class ForksByHand:
    """Forks as C code would, without the hooks of Python: the process keeps everything open."""

    pid: int = 0

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if not self.pid:
            import ctypes

            self.pid = ctypes.CDLL(None).fork()
            if self.pid == 0:
                while True:
                    ctypes.CDLL(None).pause()


def test_a_process_that_has_all_pipes_open_does_not_delay_the_end(
    look: Any, tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    forks = ForksByHand()
    try:
        tiny_run(Mlflow(experiment="forks by hand", **LIMITS), forks)
        assert look.run("forks by hand").info.status == "FINISHED"
        assert TOO_LATE not in caplog.text
    finally:
        os.kill(forks.pid, signal.SIGKILL)
        os.waitpid(forks.pid, 0)


def test_the_final_wait_reports_each_percentage_once_and_100_at_the_end(tmp_path: Path) -> None:
    from fundamentallm_mlflow.child import TASK, FinalWait
    from fundamentallm_mlflow.sync_state import SyncedRun, SyncState

    (tmp_path / "journal.jsonl").write_bytes(b"x" * 1000)
    state = SyncState(tmp_path)
    state.runs.append(SyncedRun("r", "1", "s", "e", [0], history=False, uploaded=0))

    class Slow:
        """Uploads everything, and takes six more looks to exit."""

        def finish(self, seconds: float, waiting: Any) -> str | None:
            for uploaded in (0, 500, 500, 999, *[1000] * 6):
                state.runs[0].uploaded = uploaded
                state.save()
                waiting()
            return None

    reports: list[tuple[str, int, int]] = []
    slow: Any = Slow()
    assert FinalWait(tmp_path, 60.0, lambda *one: reports.append(one)).wait(slow) is None
    assert reports == [(TASK, done, 100) for done in (0, 50, 99, 100)]
