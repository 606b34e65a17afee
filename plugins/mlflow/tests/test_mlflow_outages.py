"""Runs on a real server that dies, hangs and comes back, and what is refused at the start."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fundamentallm import PluginError, hookimpl, plugin
from fundamentallm.testing import TinyRun
from fundamentallm_mlflow import Mlflow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fundamentallm import Run

pytestmark = pytest.mark.slow

LIMITS = {"start_seconds": 120.0, "end_seconds": 200.0, "plot": False, "system_seconds": 0.0}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """An MLflow server of its own process group, on one port and one database."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mlflow",
                "server",
                "--backend-store-uri",
                f"sqlite:///{self.folder / 'served.db'}",
                "--artifacts-destination",
                str(self.folder / "files"),
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--workers",
                "1",
            ],
            start_new_session=True,
            env=dict(os.environ) | quiet,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).read()
            except OSError:
                assert time.monotonic() < until, "the server does not start"
                time.sleep(0.2)
            else:
                return

    def tell(self, number: int) -> None:
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    one = Server(tmp_path)
    yield one
    one.tell(signal.SIGCONT)
    one.tell(signal.SIGKILL)


@plugin
class Slowly:
    """Takes time for each step, and does something at some of them."""

    seconds: float
    """How much."""
    doing: Any
    """What to do by step."""

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        time.sleep(self.seconds)
        do: Callable[[], None] | None = self.doing.get(run.progress.step)
        if do is not None:
            do()


def compare(look: Any, run: Run) -> None:
    """Fail unless the store has exactly the rows of the run."""
    kept = look.run("outage")
    assert kept.info.status == "FINISHED"
    for key in {key for row in run.history for key in row} - {"step"}:
        wanted = [(int(row["step"]), row[key]) for row in run.history if key in row]
        assert look.points(kept, key) == wanted, key


def test_nothing_is_lost_or_doubled_when_the_server_is_dead_for_the_middle_third(
    look: Any, server: Server, tiny_run: TinyRun, caplog: pytest.LogCaptureFixture, watch: Any
) -> None:
    """And a row costs the training what it costs while the server is there."""
    doing = {100: lambda: server.tell(signal.SIGKILL), 200: server.start}
    one = Mlflow(experiment="outage", tracking_uri=server.uri, **LIMITS)
    slowly = Slowly(seconds=0.1, doing=doing)
    run = tiny_run(one, watch, slowly, length=300, log_every=1, validate_every=10)
    compare(type(look)(server.uri), run)
    watch.assert_rows_cost_one_write(2, away=range(101, 200))
    watch.assert_it_stayed_at_home()
    said = [r.message for r in caplog.records if r.levelname == "WARNING" and "mlflow" in r.message]
    assert len(said) == 2, said
    assert "cannot be used" in said[0]
    assert "is back" in said[1]


def test_nothing_is_lost_or_doubled_when_the_server_hangs_and_is_restarted(
    look: Any, server: Server, tiny_run: TinyRun, watch: Any
) -> None:
    """Nor does a row cost the training more while nothing answers, for twenty seconds."""

    def restart() -> None:
        server.tell(signal.SIGKILL)
        server.start()

    doing = {
        50: lambda: server.tell(signal.SIGSTOP),
        250: lambda: server.tell(signal.SIGCONT),
        270: restart,
    }
    one = Mlflow(experiment="outage", tracking_uri=server.uri, **LIMITS)
    slowly = Slowly(seconds=0.1, doing=doing)
    run = tiny_run(one, watch, slowly, length=300, log_every=1, validate_every=10)
    compare(type(look)(server.uri), run)
    watch.assert_rows_cost_one_write(2, away=range(51, 250))
    watch.assert_it_stayed_at_home()


def test_two_runs_that_start_at_once_on_a_server_have_one_parent(
    look: Any, server: Server, started_together: Callable[[str], None]
) -> None:
    started_together(server.uri)
    runs = type(look)(server.uri).runs("together")
    assert len({run.data.tags.get("mlflow.parentRunId") for run in runs} - {None}) == 1
    assert len(runs) == 3


def refused(tiny_run: TinyRun, uri: str) -> str:
    with pytest.raises(PluginError) as caught:
        tiny_run(Mlflow(tracking_uri=uri, start_seconds=60.0))
    assert uri in str(caught.value)
    return str(caught.value)


def test_a_server_that_is_not_mlflow_is_named(tiny_run: TinyRun) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.end_headers()
            self.wfile.write(b"<html>nothing here</html>")

        def log_message(self, *given: Any) -> None:
            """Say nothing."""

    page = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=page.serve_forever, daemon=True).start()
    said = refused(tiny_run, f"http://127.0.0.1:{page.server_port}")
    page.shutdown()
    assert "this is not an MLflow server (it answers 404): correct tracking_uri" in said


def test_a_closed_port_is_named_in_a_line(tiny_run: TinyRun) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    said = refused(tiny_run, uri).partition(" (details: ")[0]
    assert said == (
        f"mlflow: the store {uri} cannot be used: Connection refused: start its server, or set "
        "tracking_uri to a store that is there"
    )


def test_a_port_that_never_answers_ends_the_start(tiny_run: TinyRun, silent: str) -> None:
    said = refused(tiny_run, silent)
    assert "does not answer in time: start its server" in said or "did not open within" in said


def test_a_database_of_a_newer_version_stays_unchanged(
    look: Any, tiny_run: TinyRun, tmp_path: Path
) -> None:
    look.client.search_experiments()
    newer = tmp_path / "newer.db"
    newer.write_bytes(Path(look.uri.removeprefix("sqlite:///")).read_bytes())
    with sqlite3.connect(newer) as database:
        database.execute("update alembic_version set version_num = 'ffffffffffff'")
    before = newer.read_bytes()
    said = refused(tiny_run, f"sqlite:///{newer}")
    assert "the database has schema ffffffffffff, and this mlflow" in said
    assert newer.read_bytes() == before


def test_a_folder_that_cannot_be_written_is_named(tiny_run: TinyRun) -> None:
    assert "No such file" in refused(tiny_run, "sqlite:////proc/no/mlflow.db")


def test_the_address_of_the_charts_is_printed_when_the_server_answers(
    look: Any, tmp_path: Path
) -> None:
    look.client.create_experiment("shown")
    port = free_port()
    words = ["ui", "--uri", look.uri, "--experiment", "shown", "--port", str(port)]
    shown = subprocess.Popen(
        [sys.executable, "-m", "fundamentallm", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
        env=dict(os.environ) | {"http_proxy": f"http://127.0.0.1:{free_port()}"},
    )
    try:
        assert shown.stdout is not None
        url = next(line.strip() for line in shown.stdout if line.startswith("http"))
        found = look.client.get_experiment_by_name("shown").experiment_id
        assert url.startswith(f"http://127.0.0.1:{port}/#/experiments/{found}/runs?workflowType=")
        with urllib.request.urlopen(url, timeout=30) as page:
            assert page.status == 200
        assert len(processes_of(shown.pid)) <= 2
    finally:
        os.killpg(shown.pid, signal.SIGTERM)
        assert shown.wait(60) is not None


def processes_of(group: int) -> list[int]:
    import psutil

    found = []
    for one in psutil.process_iter():
        try:
            if os.getpgid(one.pid) == group and "resource_tracker" not in " ".join(one.cmdline()):
                found.append(one.pid)
        except (psutil.Error, ProcessLookupError):
            continue
    return found
