"""The commands ``fundamentallm mlflow sync`` and ``fundamentallm ui``."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import urllib.request
from pathlib import Path

import click

from fundamentallm import PluginError, SettingsError
from fundamentallm import folder as run_folder
from fundamentallm_mlflow import Mlflow
from fundamentallm_mlflow.tracking_uri import (
    PORT,
    absolute,
    charts,
    database,
    is_server,
    masked,
    store_of,
)

URI = click.option("--uri", help="The store; replaces the one in the settings.")


@click.group()
def mlflow() -> None:
    """Manage the MLflow data of runs."""


@mlflow.command()
@click.argument("run", type=click.Path(path_type=Path))
@URI
def sync(run: Path, uri: str | None) -> None:
    """Upload the rows of the run in folder RUN that the store does not have."""
    found = recorded(run)
    if not found:
        raise SettingsError(f"{run}: its settings list no mlflow plugin")
    for name, settings in found.items():
        click.echo(upload_rest(run, name, settings, uri))


@click.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@URI
@click.option("--experiment", help="The experiment to show; replaces that of RUN.")
@click.option("--port", type=click.IntRange(1, 65535), default=PORT, show_default=True)
def ui(run: Path | None, uri: str | None, experiment: str | None, port: int) -> None:
    """Start MLflow's server for this machine only, and print the address of the charts.

    Store and experiment are those of the run in folder RUN. Without RUN, the store is that of the
    environment variable MLFLOW_TRACKING_URI, or mlflow.db in the working directory.
    """
    plugin, settings = next(iter(recorded(run).items()) if run else iter(()), ("", Mlflow()))
    store = store_of(settings.tracking_uri, run / plugin) if run and not uri else absolute(uri)
    name = experiment or settings.experiment
    file = database(store)
    if file is not None and not file.is_file():
        # MLflow would create an empty database.
        raise SettingsError(f"{file}: there is no such database: give a run folder or --uri")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # it would start four processes
    from fundamentallm_mlflow.worker.session import explain

    try:
        from fundamentallm_mlflow.worker.client import Client

        where = charts(store, Client(store, name).experiment_id, port)
    except Exception as error:
        text = explain(error).replace(store, masked(store))
        raise PluginError(f"the store {masked(store)} cannot be used: {text}") from error
    if is_server(store):
        click.echo(where)
    else:
        serve(store, port, where)


def recorded(run: Path) -> dict[str, Mlflow]:
    """Return the mlflow plugins in the settings of a run folder, by instance name."""
    # Not composed: the run's other plugins may not be installed here.
    tables = run_folder.settings(run)
    listed = {name: dict(tables.get(name, {})) for name in tables.get("plugins", [])}
    wanted = {name: one for name, one in listed.items() if one.pop("plugin", name) == "mlflow"}
    try:
        return {name: Mlflow(**settings) for name, settings in wanted.items()}
    except TypeError as error:
        path = run / run_folder.SETTINGS
        raise SettingsError(f"{path}: {', '.join(wanted)}: {error}") from error


def upload_rest(run: Path, name: str, settings: Mlflow, uri: str | None) -> str:
    """Upload the rest of one instance's journal; return the line to print."""
    from fundamentallm_mlflow.child import LOG_FILE, Worker
    from fundamentallm_mlflow.journal import is_open

    folder = run.resolve() / name
    journal = folder / "journal.jsonl"
    if not journal.is_file():
        raise SettingsError(f"{folder}: has no journal: the run was not started with mlflow")
    if is_open(journal):
        raise SettingsError(f"{run}: is being trained, and the training uploads its rows")
    store = absolute(uri) if uri else store_of(settings.tracking_uri, folder)
    request = settings.request(run, store)
    # Strict, since a person waits for the answer; no training runs that could be measured.
    worker = Worker(folder, request | {"strict": True, "system_seconds": 0.0})
    reply = worker.wait_open()
    reply = reply if "error" in reply else worker.attach()
    if "error" in reply:
        worker.kill()
        raise PluginError(worker.explain(reply["error"]))
    problem = worker.finish(None)
    if problem is not None:
        raise PluginError(f"mlflow: {problem} (details: {folder / LOG_FILE})")
    return f"{run}: all rows are in run {reply['run_id']} of {masked(store)}"


def serve(store: str, port: int, where: str) -> None:
    """Run the server until it is interrupted; it takes this process and one more."""
    # Before MLflow is imported, which takes seconds: a port in use is reported at once.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SettingsError(f"port {port}: {error.strerror}; choose another: --port") from error
    from mlflow.cli import cli

    # Deprecation warnings of the server's libraries would hide the address.
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    threading.Thread(target=_announce, args=(port, where), daemon=True).start()
    words = [
        "server",
        "--backend-store-uri",
        store,
        "--registry-store-uri",
        store,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--uvicorn-opts",
        "--log-level warning",
    ]
    cli.main(words, prog_name="mlflow", standalone_mode=False)


def _announce(port: int, where: str) -> None:
    """Print the address of the charts as soon as the server answers."""
    # The environment may name a proxy, which does not reach a server on this machine.
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        time.sleep(0.2)
        try:
            with direct.open(f"http://127.0.0.1:{port}/health", timeout=5):
                break
        except OSError:
            continue
    click.echo(where)
    sys.stdout.flush()
