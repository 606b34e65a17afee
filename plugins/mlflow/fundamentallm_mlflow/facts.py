"""What MLflow is told about a run besides its metrics: parameters, tags, data, description."""

from __future__ import annotations

import getpass
import hashlib
import json
import shlex
from typing import TYPE_CHECKING, Any

from fundamentallm import Period, hook_methods, role_of, setting_fields
from fundamentallm_mlflow.note import note, program
from fundamentallm_mlflow.places import noted

if TYPE_CHECKING:
    from fundamentallm import Run
    from fundamentallm_mlflow import Mlflow

_FOLDERS = ("name", "folder")
_LONGEST_DIGEST = 36


def start_of(run: Run, own: Mlflow, uri: str) -> dict[str, Any]:
    """Return what the ``start`` row says of a run, which goes into the store ``uri``."""
    settings = parameters(run, own)
    return {
        "step": run.progress.step,
        "resume": own.resume,
        "chosen": run.wanted_checkpoint not in (None, "latest"),
        "name": own.run_name or run.name,
        "parameters": settings,
        "tags": tags(run, own.tags, settings),
        "dataset": dataset(run),
        "records": records(run),
        "upload": own.upload_checkpoints,
        "registry": registry(own),
        "parent": own.parent,
        **noted(own.tracking_uri, uri),
    }


def registry(own: Mlflow) -> dict[str, str] | None:
    """Return what is to be registered, and by which metric."""
    if own.registry is None:
        return None
    return {"name": own.registry, "monitor": own.monitor, "mode": own.mode}


def parameters(run: Run, own: object) -> dict[str, str]:
    """Return the settings that can make a difference to the result, as ``table.key`` -> text.

    Loggers, bars and savers are left out: they cannot, and would be most of the columns of a
    comparison.
    """
    tables: dict[str, Any] = {"run": run.settings} | {
        name: instance
        for name, instance in run.plugins.items()
        if instance is not own and role_of(instance) != "observer" and not _saves(instance)
    }
    flat = {key: value for name, table in tables.items() for key, value in _flat(name, table)}
    flat["model.parameters"] = str(sum(parameter.numel() for parameter in run.parameters))
    return {key: value for key, value in flat.items() if key.partition(".")[2] not in _FOLDERS}


def dataset(run: Run) -> dict[str, Any]:
    """Return name, digest and size of the data; ``tokens`` are those of one epoch."""
    builder = next((name for name, one in run.plugins.items() if hasattr(one, "build_data")), "")
    samples, context = run.data.epoch_samples, getattr(run.data, "context_length", None)
    tokens = samples * context if samples and context else None
    profile = {
        "samples": samples,
        "context_length": context,
        "tokens": tokens,
        "vocab_size": getattr(run.data, "vocab_size", None),
    }
    return {
        "name": builder or type(run.data).__name__,
        "digest": run.data.fingerprint[:_LONGEST_DIGEST],
        "source": dict(run.tables.get(builder, {})) | {"fingerprint": run.data.fingerprint},
        "profile": {key: value for key, value in profile.items() if value is not None},
    }


def tags(run: Run, chosen: dict[str, str], settings: dict[str, str]) -> dict[str, str]:
    """Return the user's tags, and those that tell where the run came from."""
    record = run.folder / "environment.json"
    environment = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    git, command = environment.get("git") or {}, environment.get("command") or []
    found = {
        "mlflow.source.type": "LOCAL",
        # The page shows what follows the last slash of it; the description has it whole.
        "mlflow.source.name": program(command) if command else None,
        "command": shlex.join([program(command), *command[1:]]) if command else None,
        "mlflow.source.git.commit": git.get("commit"),
        "mlflow.user": _user(),
        "mlflow.note.content": note(run, settings, environment),
        "git.dirty": git.get("dirty") if git.get("commit") else None,
        "host": environment.get("host"),
        "device": run.device,
        "world_size": run.world_size,
        "run_folder": str(run.folder.resolve()),
        # Not of settings.toml: two runs that differ in name and loggers only have the same.
        "settings.sha256": _digest(settings),
    }
    found |= {f"version.{k}": v for k, v in environment.get("versions", {}).items()}
    found |= {f"plugin.{k}": v for k, v in environment.get("plugins", {}).items()}
    return {key: _text(value) for key, value in found.items() if value not in (None, "")} | chosen


def records(run: Run) -> list[str]:
    """Return the files of the run folder that MLflow keeps a copy of."""
    names = ("settings.toml", "environment.json")
    return [str(run.folder.resolve() / n) for n in names if (run.folder / n).is_file()]


def _saves(instance: object) -> bool:
    return any(hook == "read_checkpoint" for hook, _, _ in hook_methods(type(instance)))


def _flat(prefix: str, value: Any) -> list[tuple[str, str]]:
    if hasattr(type(value), "__attrs_attrs__") and not isinstance(value, Period):
        value = {name: getattr(value, name) for name in setting_fields(type(value))}
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(f"{prefix}.{key}", inner)]
    return [] if value is None else [(prefix, _text(value))]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(_text(part) for part in value)
    return str(value)


def _digest(settings: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without an entry for this user
        return None
