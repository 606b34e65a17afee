"""``fundamentallm mlflow`` and ``fundamentallm ui``: what is left to do with MLflow by hand."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import tomllib
import urllib.request
from pathlib import Path

import click

from fundamentallm import PluginError, SettingsError
from fundamentallm_mlflow import Mlflow
from fundamentallm_mlflow.database import database
from fundamentallm_mlflow.places import PORT, charts, chosen, is_server, masked, settled

URI = click.option("--uri", help="The store, in place of the one that is set.")


@click.group()
def mlflow() -> None:
    """Look after what is in MLflow."""


@mlflow.command()
@click.argument("run", type=click.Path(path_type=Path))
@URI
def sync(run: Path, uri: str | None) -> None:
    """Ship what the store has not yet taken of the run in folder RUN."""
    found = recorded(run)
    if not found:
        raise SettingsError(f"{run}: its settings list no mlflow plugin")
    for name, settings in found.items():
        click.echo(synced(run, name, settings, uri))


@click.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@URI
@click.option("--experiment", help="The experiment to show, in place of that of RUN.")
@click.option("--port", type=click.IntRange(1, 65535), default=PORT, show_default=True)
def ui(run: Path | None, uri: str | None, experiment: str | None, port: int) -> None:
    """Start MLflow's server on this machine only, and print where the charts are.

    Of the run in folder RUN it takes store and experiment; without one, the store is that of the
    environment variable MLFLOW_TRACKING_URI, or mlflow.db in this folder.
    """
    plugin, settings = next(iter(recorded(run).items()) if run else iter(()), ("", Mlflow()))
    store = settled(settings.tracking_uri, run / plugin) if run and not uri else chosen(uri)
    name = experiment or settings.experiment
    file = database(store)
    if file is not None and not file.is_file():
        raise SettingsError(f"{file}: there is no such database: name a run folder, or --uri")
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # four processes for evaluations
    from fundamentallm_mlflow.ship import reason

    try:
        from fundamentallm_mlflow.store import Store

        where = charts(store, Store(store, name).experiment_id, port)
    except Exception as error:
        said = reason(error).replace(store, masked(store))
        raise PluginError(f"the store {masked(store)} cannot be used: {said}") from error
    if is_server(store):
        click.echo(where)
    else:
        serve(store, port, where)


def recorded(run: Path) -> dict[str, Mlflow]:
    """Return the mlflow plugins of a run folder's settings by name."""
    path = run / "settings.toml"
    if not path.is_file():
        raise SettingsError(f"{run}: is not a run folder: it has no settings.toml")
    # Not composed: whether the other plugins can be built any more makes no difference here.
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    listed = {name: dict(tables.get(name, {})) for name in tables.get("plugins", [])}
    wanted = {name: one for name, one in listed.items() if one.pop("plugin", name) == "mlflow"}
    try:
        return {name: Mlflow(**settings) for name, settings in wanted.items()}
    except TypeError as error:
        raise SettingsError(f"{path}: {', '.join(wanted)}: {error}") from error


def synced(run: Path, name: str, settings: Mlflow, uri: str | None) -> str:
    """Ship what is left of one instance; return what to say of it."""
    from fundamentallm_mlflow.journal import is_open
    from fundamentallm_mlflow.shipper import Shipper

    folder = run.resolve() / name
    journal = folder / "journal.jsonl"
    if not journal.is_file():
        raise SettingsError(f"{folder}: has no journal: the run has not been started with mlflow")
    if is_open(journal):
        raise SettingsError(f"{run}: is being trained, which ships it")
    store = chosen(uri) if uri else settled(settings.tracking_uri, folder)
    request = settings.request(run, store)
    shipper = Shipper(folder, request | {"strict": True, "system_seconds": 0.0})
    answer = shipper.open()
    answer = answer if "error" in answer else shipper.attach()
    if "error" in answer:
        shipper.kill()
        raise PluginError(shipper.why(answer["error"]))
    left = shipper.finish(None)
    if left is not None:
        raise PluginError(f"mlflow: {left} (details: {folder / 'ship.log'})")
    return f"{run}: all is in run {answer['run_id']} of {masked(store)}"


def serve(store: str, port: int, where: str) -> None:
    """Run the server in this process and one more, until it is interrupted."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SettingsError(f"port {port}: {error.strerror}; choose another: --port") from error
    from mlflow.cli import cli

    # The server's own words about itself are none of the reader's business; its errors are.
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
    """Print the URL as soon as the server answers."""
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
