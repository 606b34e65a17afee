"""A store for all tests of a session, and ways to look into it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import attrs
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun


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


STARTS = """
import sys
from fundamentallm_mlflow.store import Store
store = Store(sys.argv[1], "together")
print("ready", flush=True)
sys.stdin.readline()
store.run_for({"id": sys.argv[2], "time": 1, "name": "r", "parent": "one"})
"""


@pytest.fixture
def started_together() -> Callable[[str], None]:
    """Return what starts two runs of one parent in a store at the same moment."""

    def start(uri: str) -> None:
        words = [sys.executable, "-c", STARTS, uri]
        both = [subprocess.Popen([*words, name * 32], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                for name in "ab"]  # fmt: skip
        for one in both:
            assert one.stdout is not None
            assert one.stdout.readline() == b"ready\n"
        for one in both:
            assert one.stdin is not None
            one.stdin.close()
        assert [one.wait() for one in both] == [0, 0]

    return start
