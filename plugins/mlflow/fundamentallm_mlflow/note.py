"""The description of a run, which MLflow shows above everything else, as Markdown."""

from __future__ import annotations

import shlex
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fundamentallm import Run

LINE = 88
"""Longest line of a command, in characters: what fits the column without scrolling."""


def note(run: Run, settings: dict[str, str], environment: dict[str, Any]) -> str:
    """Say what is trained on what, by which command and code, and how to go on with it."""
    folder = run.folder.resolve()
    tables = dict.fromkeys(key.partition(".")[0] for key in settings)
    parts = ", ".join(f"`{name}`" for name in run.plugins if name in tables)
    weights = int(settings["model.parameters"])
    said = [f"**{run.name}**: {weights:,} weights, {run.settings.length}, with {parts}."]
    if words := environment.get("command"):
        said += [_fenced(wrapped([program(words), *words[1:]]))]
    git = environment.get("git") or {}
    if commit := git.get("commit"):
        changes = ", with changes that were not committed" if git.get("dirty") else ""
        said += [f"Code: commit `{commit[:12]}`{changes}."]
    said += ["Go on with it, in whatever state it is:"]
    said += [_fenced(wrapped(["fundamentallm", "resume", str(folder)]))]
    return "\n\n".join(said)


def program(words: list[str]) -> str:
    """Return the name of the program of a command; ``python -m name`` is ``name``."""
    path = Path(words[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def wrapped(words: list[str]) -> str:
    """Return a command to paste into a shell, in lines that end before an option.

    An option and its value stay on one line, however long that is.
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


def _fenced(text: str) -> str:
    return f"```sh\n{text}\n```"
