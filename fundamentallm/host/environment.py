"""What a composition ran in: versions, machine, command and commit."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs

from fundamentallm.host.compose import Composed
from fundamentallm.host.host import role_of


def environment(
    composed: Composed, distributions: Iterable[str] = (), **more: Any
) -> dict[str, Any]:
    """Describe in JSON values what a composition depends on in addition to its settings.

    ``distributions`` are those whose versions matter in addition to those of the plugins. ``more``
    is added as it is, for example the devices of the machine.
    """
    versions = ("pluggy", *distributions)
    return {
        "versions": {name: metadata.version(name) for name in versions},
        "plugins": {name: attrs.asdict(who) for name, who in composed.brought.items()},
        "roles": {
            name: role_of(composed.host, type(one)) for name, one in composed.plugins.items()
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "processor": _processor(),
        **more,
        "command": sys.argv,
        "started": time.time(),
        "git": {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain"))},
    }


def _processor() -> str:
    """Name the processor's model; Python itself has no name for it on Linux."""
    known = Path("/proc/cpuinfo")
    text = known.read_text() if known.exists() else ""
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _git(*words: str) -> str | None:
    try:
        command = ["git", *words]
        # A git that hangs must not keep the run from its start.
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
