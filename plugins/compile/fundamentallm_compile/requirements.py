"""What a backend needs beside PyTorch, looked for before anything is built."""

from __future__ import annotations

import difflib
import importlib.util
import os
import shutil
import sys
import sysconfig
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fundamentallm import SettingsError, StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# Runs what torch.compile captures without making code of it: to find out whose mistake one is.
_DEBUGGING = "aot_eager"
# Uses the memory of one step's results again in the next, but losses live until they are logged.
_UNFIT = "cudagraphs"


def check(backend: str, device: str, plugin: str) -> None:
    """Raise ``SettingsError`` if the backend is unknown, or cannot make code for ``device``."""
    known = sorted({*torch.compiler.list_backends(), _DEBUGGING} - {_UNFIT})
    if backend not in known:
        close = difflib.get_close_matches(backend, known, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        raise SettingsError(f"{plugin}.backend: PyTorch has no {backend!r} ({advice})")
    if backend == "inductor":
        missing = list(_missing(device))
        if missing:
            wanted = "; ".join(missing)
            raise SettingsError(
                f"{plugin}: cannot compile for {device!r} here: {wanted}. "
                f"Or take {plugin!r} out of the plugins"
            )


def _missing(device: str) -> Iterator[str]:
    if device.startswith("mps"):
        return
    on_gpu = device.startswith("cuda")
    if on_gpu and importlib.util.find_spec("triton") is None:
        yield "there is no Triton (pip install triton)"
    if on_gpu and torch.cuda.is_available() and torch.cuda.get_device_capability() < (7, 0):
        yield "the GPU is older than what Triton makes code for (compute capability 7.0)"
    if not any(map(shutil.which, _compilers(on_gpu=on_gpu))):
        kind, variable = ("C", "CC") if on_gpu else ("C++", "CXX")
        names = " or ".join(_compilers(on_gpu=on_gpu))
        yield f"there is no {kind} compiler ({names}): install one, or name yours in {variable}"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        yield f"{header} is missing: install Python's headers (python3-dev, python3-devel)"


def _compilers(*, on_gpu: bool) -> list[str]:
    """Return what the backend would call: the one that the environment names, or its own choice."""
    if on_gpu:
        return [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    own = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return [os.environ.get("CXX", own)]


def use_cache(folder: Path, plugin: str) -> Callable[[], None]:
    """Keep compiled code in ``folder``; return what puts the environment back."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{plugin}.cache_dir: {folder}: {error.strerror or error}") from error
    before = os.environ.get(_CACHE)
    os.environ[_CACHE] = str(folder)
    return partial(_restore, before)


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop(_CACHE, None)
    else:
        os.environ[_CACHE] = before
