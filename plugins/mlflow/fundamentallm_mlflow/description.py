"""Describe a run to MLflow: parameters, tags, data, and a description in Markdown."""

from __future__ import annotations

import getpass
import hashlib
import json
import shlex
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fundamentallm import Provenance, answering, flatten, folder, role_of
from fundamentallm_mlflow.tracking_uri import recorded_uri

if TYPE_CHECKING:
    from fundamentallm import Run
    from fundamentallm_mlflow import Mlflow

# Where a run is stored does not change its result.
_FOLDERS = ("name", "folder")
_LONGEST_DIGEST = 36  # MLflow's limit
LINE = 88
"""Longest line of a command in characters: MLflow's column shows it without scrolling."""


def start_of(run: Run, own: Mlflow, uri: str) -> dict[str, Any]:
    """Return the ``start`` row of a run, whose store is ``uri``."""
    settings = parameters(run, own)
    return {
        "step": run.progress.step,
        "resume": own.resume,
        "chose_checkpoint": run.wanted_checkpoint not in (None, "latest"),
        "name": own.run_name or run.name,
        "parameters": settings,
        "tags": tags(run, own.tags, settings),
        "dataset": dataset(run),
        "records": records(run),
        "upload": own.upload_checkpoints,
        "registry": registry(own),
        "parent": own.parent,
        **recorded_uri(own.tracking_uri, uri),
    }


def registry(own: Mlflow) -> dict[str, str] | None:
    """Return the registered model's name and the metric that decides; None without ``registry``."""
    if own.registry is None:
        return None
    return {"name": own.registry, "monitor": own.monitor, "mode": own.mode}


def parameters(run: Run, own: object) -> dict[str, str]:
    """Return the settings that can change the result, as ``table.key`` -> text.

    Observers and savers cannot change it, and would be most of the columns of a comparison.
    """
    tables: dict[str, Any] = {"run": run.settings} | {
        name: instance
        for name, instance in run.plugins.items()
        if instance is not own and role_of(instance) not in ("observer", "saver")
    }
    flat = {key: _text(value) for key, value in flatten(tables).items() if value is not None}
    flat["model.parameters"] = str(sum(parameter.numel() for parameter in run.parameters))
    return {key: value for key, value in flat.items() if key.partition(".")[2] not in _FOLDERS}


def dataset(run: Run) -> dict[str, Any]:
    """Return name, digest and size of the data; ``tokens`` is the number in one epoch."""
    builder = answering(run.plugins, "build_data") or ""
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


def tags(run: Run, own: dict[str, str], settings: dict[str, str]) -> dict[str, str]:
    """Return the user's tags, and tags for the origin of the run."""
    environment = folder.environment(run.folder)
    git, command = environment.get("git") or {}, environment.get("command") or []
    found = {
        "mlflow.source.type": "LOCAL",
        # The page shows only what follows the last slash; the description has the whole command.
        "mlflow.source.name": program(command) if command else None,
        "command": shlex.join([program(command), *command[1:]]) if command else None,
        "mlflow.source.git.commit": git.get("commit"),
        "mlflow.user": _user(),
        "mlflow.note.content": description(run, settings, environment),
        "git.dirty": git.get("dirty") if git.get("commit") else None,
        "host": environment.get("host"),
        "device": run.device,
        "world_size": run.world_size,
        "run_folder": str(run.folder.resolve()),
        # Not a digest of settings.toml: runs that differ only in name and loggers have one digest.
        "settings.sha256": _digest(settings),
    }
    found |= {f"version.{k}": v for k, v in environment.get("versions", {}).items()}
    plugins = environment.get("plugins", {}).items()
    found |= {f"plugin.{name}": Provenance.from_json(facts) for name, facts in plugins}
    # The user's tags come last and replace those of the plugin.
    return {key: _text(value) for key, value in found.items() if value not in (None, "")} | own


def records(run: Run) -> list[str]:
    """Return the files of the run folder that are uploaded at the start."""
    names = (folder.SETTINGS, folder.ENVIRONMENT)
    return [str(run.folder.resolve() / n) for n in names if (run.folder / n).is_file()]


def description(run: Run, settings: dict[str, str], environment: dict[str, Any]) -> str:
    """Return Markdown with model size, plugins, command, commit, and the command to resume."""
    place = run.folder.resolve()
    tables = dict.fromkeys(key.partition(".")[0] for key in settings)
    names = ", ".join(f"`{name}`" for name in run.plugins if name in tables)
    weights = int(settings["model.parameters"])
    parts = [f"**{run.name}**: {weights:,} weights, {run.settings.length}, with {names}."]
    if words := environment.get("command"):
        parts += [_fenced(wrapped([program(words), *words[1:]]))]
    git = environment.get("git") or {}
    if commit := git.get("commit"):
        changes = ", with changes that were not committed" if git.get("dirty") else ""
        parts += [f"Code: commit `{commit[:12]}`{changes}."]
    parts += ["Resume it:"]
    parts += [_fenced(wrapped(["fundamentallm", "resume", str(place)]))]
    return "\n\n".join(parts)


def program(words: list[str]) -> str:
    """Return the program name of a command; for ``python -m name`` it is ``name``."""
    path = Path(words[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def wrapped(words: list[str]) -> str:
    """Return a command for a shell, with line breaks only before options.

    An option and its value stay on one line, however long it is.
    """
    starts = [0, *(i for i, word in enumerate(words) if i and word.startswith("-")), len(words)]
    groups = [shlex.join(words[first:last]) for first, last in pairwise(starts)]
    lines = groups[:1]
    for group in groups[1:]:
        if len(lines[-1]) + len(group) < LINE:
            lines[-1] += f" {group}"
        else:
            lines.append(f"    {group}")
    return " \\\n".join(lines)


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
    except (OSError, KeyError):  # a container has no entry for this user
        return None


def _fenced(text: str) -> str:
    return f"```sh\n{text}\n```"
