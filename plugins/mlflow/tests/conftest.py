"""A store for all tests of a session, and ways to look into it."""

from __future__ import annotations

import gc
import os
import resource
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from fundamentallm import field, hookimpl, plugin

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

    from fundamentallm import Run


@attrs.frozen
class Look:
    """What is in a store, asked of MLflow itself."""

    uri: str

    @property
    def client(self) -> MlflowClient:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        from mlflow import MlflowClient

        return MlflowClient(self.uri, registry_uri=self.uri)

    def runs(self, experiment: str) -> list[MlflowRun]:
        """Return the runs of an experiment, oldest first."""
        found = self.client.get_experiment_by_name(experiment)
        assert found is not None
        runs = self.client.search_runs([found.experiment_id])
        return sorted(runs, key=lambda run: run.info.start_time)

    def run(self, experiment: str) -> MlflowRun:
        (run,) = self.runs(experiment)
        return run

    def points(self, run: MlflowRun | str, key: str) -> list[tuple[int, float]]:
        run_id = run if isinstance(run, str) else run.info.run_id
        return sorted((m.step, m.value) for m in self.client.get_metric_history(run_id, key))

    def files(self, run: MlflowRun, folder: str | None = None) -> set[str]:
        return {file.path for file in self.client.list_artifacts(run.info.run_id, folder)}


@pytest.fixture(scope="session")
def look(tmp_path_factory: pytest.TempPathFactory) -> Look:
    """One store for all tests: making one takes seconds. Each test has its own experiment."""
    return Look(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")


@pytest.fixture(autouse=True)
def _store(look: Look, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", look.uri)


# Where Python may leave a thread waiting: everything that asks the system for something.
MAY_WAIT = {
    "posix",
    "select",
    "_socket",
    "_ssl",
    "_io",
    "_thread",
    "_posixsubprocess",
    "fcntl",
    "signal",
    "_signal",
    "_queue",
}
_watching: list[Watch] = []


@plugin
class Watch:
    """Looks at everything that the hooks of ``mlflow`` call, from the start of the training on."""

    rows: dict[int, list[str]] = field(init=False, factory=dict)
    """What the row of each step called, Python or C, by module and name."""
    waits: dict[int, int] = field(init=False, factory=dict)
    """How often the row of each step gave up its processor by itself, as the system counts it."""
    called: list[str] = field(init=False, factory=list)
    """What all hooks called."""
    asked: list[str] = field(init=False, factory=list)
    """What all hooks asked of the interpreter that may reach out of the process: audit events."""

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        run.hook = run.bind(self.around)

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        worker: Any = run.plugins["mlflow"]._worker
        waits = os.get_blocking(worker._pipe)
        os.set_blocking(worker._pipe, False)  # or the test would wait as well
        assert not waits

    def around(self, name: str, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(**given: Any) -> Any:
            before, waits = len(self.called), waited()
            gc.disable()  # what it would finalize meanwhile is anybody's
            sys.setprofile(self.see)
            _watching.append(self)
            try:
                return call(**given)
            finally:
                _watching.pop()
                sys.setprofile(None)
                gc.enable()
                if hook == "on_log":
                    step = given["run"].progress.step
                    self.rows[step], self.waits[step] = self.called[before:], waited() - waits

        return watched if name == "mlflow" else call

    def see(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "call":
            module = frame.f_globals.get("__name__", "")
            self.called.append(f"{module}.{frame.f_code.co_name}")
        elif event == "c_call" and _watching:
            module = getattr(called, "__module__", None) or type(called.__self__).__module__
            self.called.append(f"{module}.{called.__name__}")

    def assert_rows_cost_one_write(self, first: int, away: range) -> None:
        """Fail unless each row from ``first`` on costs what each other does, whether or not the
        store is there: one write, and one read that does not wait; and waits for nothing."""
        rows = {step: row for step, row in self.rows.items() if step >= first}
        with_news = {
            step for step, row in rows.items() if any(c.endswith("._log_news") for c in row)
        }
        plain = {step: row for step, row in rows.items() if step not in with_news}
        assert len(set(plain) & set(away)) > len(away) // 2
        assert set(plain) - set(away)
        assert len(with_news) <= 4
        assert {tuple(row) for row in plain.values()} == {tuple(next(iter(plain.values())))}
        row = next(iter(plain.values()))
        may_wait = [c for c in row if c.partition(".")[0] in MAY_WAIT or c == "time.sleep"]
        assert may_wait == ["posix.write", "posix.read"]
        # A disk that others keep syncing may let a write wait; a store would with every row.
        assert sum(bool(self.waits[step]) for step in plain) <= len(plain) / 5

    def assert_it_stayed_at_home(self) -> None:
        """Fail if a hook opened a connection, began a process or a thread, or called mlflow."""
        out = ("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "_thread.")
        assert [one for one in self.asked if one.startswith(out)] == []
        assert not [one for one in self.called if one.startswith("mlflow.")]


def waited() -> int:
    """Return how often this thread has waited for anything."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def _audit(event: str, _: Any) -> None:
    if _watching:
        _watching[-1].asked.append(event)


@pytest.fixture
def watch() -> Watch:
    if not _auditing:
        sys.addaudithook(_audit)  # there is no way to take it back
        _auditing.append(True)
    return Watch()


_auditing: list[bool] = []


@pytest.fixture
def silent() -> Iterator[str]:
    """A port that takes connections and never answers."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield f"http://127.0.0.1:{one.getsockname()[1]}"


STARTS = """
import sys
from fundamentallm_mlflow.worker.client import Client
store = Client(sys.argv[1], "together")
print("ready", flush=True)
sys.stdin.readline()
store.run_for({"id": sys.argv[2], "time": 1, "name": "r", "parent": "one"})
"""


@pytest.fixture
def started_together() -> Callable[[str], None]:
    """Return what starts two runs of one parent in a store at the same moment."""

    def start(uri: str) -> None:
        words = [sys.executable, "-c", STARTS, uri]
        both = [
            subprocess.Popen([*words, name * 32], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for name in "ab"
        ]
        for one in both:
            assert one.stdout is not None
            assert one.stdout.readline() == b"ready\n"
        for one in both:
            assert one.stdin is not None
            one.stdin.close()
        assert [one.wait() for one in both] == [0, 0]

    return start
