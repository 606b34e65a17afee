"""Real runs into a real sqlite store, read back through MLflow's client."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fundamentallm import FundamentalError, PluginError, hookimpl, plugin
from fundamentallm.testing import PluginContract, TinyRun
from fundamentallm_mlflow import Mlflow, absolute
from fundamentallm_mlflow.journal import Journal
from fundamentallm_mlflow.ship import Shipment, ship
from fundamentallm_mlflow.shipper import masked

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

    from fundamentallm import Run


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for all tests: making one takes seconds. Each test has its own experiment."""
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def _store(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)


def logger(experiment: str, **settings: Any) -> Mlflow:
    """Make the plugin, with patience for machines that have much else to do."""
    return Mlflow(experiment=experiment, start_seconds=120.0, end_seconds=120.0, **settings)


def client(uri: str) -> MlflowClient:
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    return MlflowClient(uri, registry_uri=uri)


def runs_of(uri: str, experiment: str) -> list[MlflowRun]:
    store = client(uri)
    found = store.get_experiment_by_name(experiment)
    assert found is not None
    return list(store.search_runs([found.experiment_id]))


def points(uri: str, run: MlflowRun, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client(uri).get_metric_history(run.info.run_id, key))


class TestContract(PluginContract):
    plugin = Mlflow
    needs = {"experiment": "contract", "start_seconds": 120.0}


def test_a_run_is_in_the_store_as_it_was(uri: str, tiny_run: TinyRun) -> None:
    run = tiny_run(logger("whole", tags={"purpose": "test"}), length=6, validate_every=4)
    (kept,) = runs_of(uri, "whole")
    assert kept.info.status == "FINISHED"
    assert kept.info.run_name == run.name
    for key in ("train/loss", "optim/lr", "val/loss"):
        assert points(uri, kept, key) == [(int(r["step"]), r[key]) for r in run.history if key in r]
    assert kept.data.params["run.length"] == "6 steps"
    assert kept.data.params["tiny_model.dropout"] == "0.1"
    assert not [key for key in kept.data.params if key.startswith("mlflow.")]
    assert kept.data.tags["purpose"] == "test"
    assert kept.data.tags["version.torch"]
    assert kept.data.tags["outcome"] == "finished"
    files = {f.path for f in client(uri).list_artifacts(kept.info.run_id)}
    assert files == {"settings.toml", "environment.json"}


@plugin
class Ends:
    """Ends the training process in one of its steps."""

    step: int
    """Which."""
    by: str
    """How."""

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if run.progress.step == self.step:
            if self.by == "error":
                raise RuntimeError("broken on purpose")
            (run.folder / "mlflow_imported").write_text(str("mlflow" in sys.modules))
            os.kill(os.getpid(), getattr(signal, self.by))


SHOT = """
import sys
sys.path.insert(0, {tests!r})
from fundamentallm import train
from fundamentallm.testing import tiny_parts
from test_mlflow import Ends, logger
parts = [logger("ends"), Ends(step=7, by="SIGKILL")]
settings = {{"run": {{"length": 8, "log_every": 2, "device": "cpu"}}}}
train(settings, plugins=[*parts, *tiny_parts(parts)], run_dir={folder!r})
"""


def test_a_run_that_ends_in_every_way_and_is_continued_each_time_is_one_run_in_the_store(
    uri: str, tiny_run: TinyRun, tmp_path: Path
) -> None:
    """There is no checkpoint: each time all is trained once more, and nothing logged twice."""

    def steps() -> list[int]:
        return [step for step, _ in points(uri, kept, "train/loss")]

    with pytest.raises(FundamentalError, match="broken on purpose"):
        tiny_run(logger("ends"), Ends(step=3, by="error"), length=8)
    (kept,) = runs_of(uri, "ends")
    assert (kept.info.status, kept.data.tags["outcome"], steps()) == ("FAILED", "failed", [2])
    assert "broken on purpose" in kept.data.tags["error"]

    tiny_run(logger("ends"), Ends(step=5, by="SIGTERM"), length=8)
    (kept,) = runs_of(uri, "ends")
    assert (kept.info.status, kept.data.tags["outcome"]) == ("KILLED", "interrupted")
    assert steps() == [2, 4]
    assert "error" not in kept.data.tags

    code = SHOT.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run"))
    shot = subprocess.run([sys.executable, "-c", code], check=False)
    assert shot.returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "mlflow_imported").read_text() == "False"
    until = time.monotonic() + 60
    while runs_of(uri, "ends")[0].info.status == "RUNNING":
        assert time.monotonic() < until
        time.sleep(0.2)
    (kept,) = runs_of(uri, "ends")
    assert (kept.info.status, kept.data.tags["outcome"]) == ("FAILED", "killed")
    assert steps() == [2, 4, 6]

    last = tiny_run(logger("ends"), length=10)
    (kept,) = runs_of(uri, "ends")
    assert (kept.info.status, kept.data.tags["outcome"]) == ("FINISHED", "finished")
    losses = [(int(row["step"]), row["train/loss"]) for row in last.history]
    assert points(uri, kept, "train/loss") == losses
    assert kept.data.params["run.length"] == "8 steps"
    assert kept.data.tags["settings.changed"] == "run.length: 8 steps -> 10 steps"


def test_a_store_that_does_not_open_ends_the_run_at_its_start(tiny_run: TinyRun) -> None:
    wrong = Mlflow(tracking_uri="nonsense://me:secret@x", start_seconds=120.0)
    with pytest.raises(PluginError, match=r"mlflow: the store nonsense://me:\*+@x cannot be") as e:
        tiny_run(wrong)
    assert "unsupported URI" in str(e.value)
    assert "secret" not in str(e.value)
    assert e.value.exit_code == 7


def test_a_store_that_takes_too_long_ends_the_run(tiny_run: TinyRun) -> None:
    with pytest.raises(PluginError, match=r"it did not open within 0\.01 seconds"):
        tiny_run(Mlflow(start_seconds=0.01))


def request(uri: str, experiment: str) -> dict[str, Any]:
    return {
        "uri": uri, "place": uri, "experiment": experiment, "name": "r", "time": 1,
        "parameters": {"groups.*bias.lr": "1"}, "tags": {}, "records": [],
    }  # fmt: skip


def test_two_runs_may_start_on_one_fresh_database(tmp_path: Path) -> None:
    fresh = f"sqlite:///{tmp_path / 'fresh.db'}"
    code = (
        "import json, pathlib, sys\n"
        "from fundamentallm_mlflow.store import Store\n"
        "Store(json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])).end({'outcome': 'finished'})\n"
    )
    wanted = json.dumps(request(fresh, "shared"))
    both = []
    for name in "ab":
        (tmp_path / name).mkdir()
        both.append(subprocess.Popen([sys.executable, "-c", code, wanted, str(tmp_path / name)]))
    assert [one.wait() for one in both] == [0, 0]
    assert [run.info.status for run in runs_of(fresh, "shared")] == ["FINISHED", "FINISHED"]


def test_a_folder_that_cannot_hold_a_database_is_an_error_at_once(tmp_path: Path) -> None:
    from fundamentallm_mlflow.store import Store

    with pytest.raises(OSError, match="/proc/no"):
        Store(request("sqlite:////proc/no/mlflow.db", "x"), tmp_path)


def test_a_deleted_experiment_is_an_error_that_says_so(uri: str, tmp_path: Path) -> None:
    from fundamentallm_mlflow.store import Store

    store = client(uri)
    store.delete_experiment(store.create_experiment("deleted"))
    with pytest.raises(ValueError, match="'deleted' was deleted there: restore it"):
        Store(request(uri, "deleted"), tmp_path)


def test_a_run_folder_whose_run_was_deleted_gets_a_new_one_with_all_rows(
    uri: str, tmp_path: Path
) -> None:
    from fundamentallm_mlflow.store import Store

    first = Store(request(uri, "gone"), tmp_path)
    first.keep(123)
    assert Store(request(uri, "gone"), tmp_path).run_id == first.run_id
    assert Store(request(uri, "gone"), tmp_path).offset == 123
    client(uri).delete_run(first.run_id)
    second = Store(request(uri, "gone"), tmp_path)
    assert second.run_id != first.run_id
    assert second.offset == 0


def test_a_refused_metric_does_not_take_others_along(uri: str, tmp_path: Path) -> None:
    from fundamentallm_mlflow.store import Store

    store = Store(request(uri, "refused"), tmp_path)
    good = [(f"m/{i}", float(i), 1, 1) for i in range(20)]
    too_long = ("x" * 300, 1.0, 1, 1)
    store.take([*good[:7], too_long, *good[7:], ("odd//name(x)", math.inf, 1, 1)])
    (kept,) = runs_of(uri, "refused")
    assert {k: v for k, v in kept.data.metrics.items() if k.startswith("m/")} == {
        key: value for key, value, _, _ in good
    }
    assert math.isnan(kept.data.metrics["odd/name_x_"])
    assert kept.data.params == {"groups._bias.lr": "1"}


def test_a_database_is_the_same_from_every_folder(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute("sqlite:///a/b.db") == f"sqlite:///{tmp_path}/a/b.db"
    assert absolute("sqlite:////x/b.db") == "sqlite:////x/b.db"
    assert absolute("http://host:5000") == "http://host:5000"


def test_passwords_are_not_shown() -> None:
    assert masked("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert masked("http://host:5000") == "http://host:5000"


def journal_of(folder: Path, steps: range) -> Path:
    journal = Journal(folder / "journal.jsonl")
    journal.append("start")
    for step in steps:
        journal.append("metrics", step=step, metrics={"train/loss": 1.0 / step})
    journal.close()
    return folder / "journal.jsonl"


def test_what_the_store_does_not_take_is_shipped_once_when_it_is_back(
    uri: str, tmp_path: Path
) -> None:
    from fundamentallm_mlflow.store import Store

    class Away(Store):
        """A store that loses the connection: before taking a batch, then after taking it."""

        failures = 0

        def take(self, points: Any) -> None:
            self.failures += 1
            if self.failures == 2:
                super().take(points)
            if self.failures < 3:
                raise ConnectionError("away")
            super().take(points)

    store = Away(request(uri, "away"), tmp_path)
    shipment = Shipment(journal_of(tmp_path, range(1, 2000)), store)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            shipment.ship()
    shipment.ship()
    (kept,) = runs_of(uri, "away")
    assert points(uri, kept, "train/loss") == [(step, 1.0 / step) for step in range(1, 2000)]
    again = Store(request(uri, "away"), tmp_path)
    assert again.offset == (tmp_path / "journal.jsonl").stat().st_size


def test_a_store_that_stays_away_is_given_up_after_the_end(uri: str, tmp_path: Path) -> None:
    from fundamentallm_mlflow.store import Store

    class Away(Store):
        def take(self, points: Any) -> None:
            raise ConnectionError("away")

    store = Away(request(uri, "stays away"), tmp_path)
    shipment = Shipment(journal_of(tmp_path, range(1, 3)), store)
    assert ship(shipment, store, parent=os.getpid(), patience=0.0) == 3
    (kept,) = runs_of(uri, "stays away")
    assert kept.info.status == "RUNNING"


def test_a_full_disk_ends_the_logging_and_not_the_training(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "run" / "mlflow").mkdir(parents=True)
    (tmp_path / "run" / "mlflow" / "journal.jsonl").symlink_to("/dev/full")
    with pytest.raises(FundamentalError, match="No space left on device"):
        tiny_run(logger("full"))
    one = logger("full")
    one._journal = Journal(tmp_path / "run" / "mlflow" / "journal.jsonl")
    run = tiny_run(run_dir=tmp_path / "plain")
    one.on_log(run, {"train/loss": 1.0})
    assert "the journal takes no more rows (No space left on device)" in caplog.text
    one.on_log(run, {"train/loss": 1.0})
