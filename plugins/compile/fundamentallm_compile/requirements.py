"""Check what a compiler backend needs in addition to PyTorch, before anything is built."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fundamentallm import SettingsError, StorageError, suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# Not in torch's list of backends: it runs the captured graph without generating code, which shows
# whether a failure comes from the capture or from the code generator.
_DEBUG_BACKEND = "aot_eager"
# Reuses the memory of one step's results in the next step, but losses live until they are logged.
_UNSAFE_BACKEND = "cudagraphs"


def check(backend: str, device: str, plugin: str) -> None:
    """Raise ``SettingsError`` if the backend is unknown or cannot generate code for ``device``.

    ``plugin`` is the instance name that begins the error.
    """
    known = sorted({*torch.compiler.list_backends(), _DEBUG_BACKEND} - {_UNSAFE_BACKEND})
    if backend not in known:
        raise SettingsError(
            f"{plugin}.backend: PyTorch has no backend {backend!r}{suggest(backend, known)}"
        )
    if backend == "inductor":
        missing = list(_missing(device))
        if missing:
            raise SettingsError(
                f"{plugin}: cannot compile for {device!r} here: {'; '.join(missing)}. "
                f"Or remove {plugin!r} from the plugins"
            )


def _missing(device: str) -> Iterator[str]:
    if device.startswith("mps"):
        return
    on_gpu = device.startswith("cuda")
    if on_gpu and importlib.util.find_spec("triton") is None:
        yield "Triton is not installed (pip install triton)"
    if on_gpu and torch.cuda.is_available() and torch.cuda.get_device_capability() < (7, 0):
        yield "the GPU is too old for Triton, which needs compute capability 7.0"
    if not any(map(shutil.which, _compilers(on_gpu=on_gpu))):
        kind, variable = ("C", "CC") if on_gpu else ("C++", "CXX")
        names = " or ".join(_compilers(on_gpu=on_gpu))
        yield f"no {kind} compiler is found ({names}): install one, or set {variable} to yours"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        yield f"{header} is missing: install Python's headers (python3-dev, python3-devel)"


def _compilers(*, on_gpu: bool) -> list[str]:
    """Return the compilers that the backend would call: the environment's, or its defaults."""
    if on_gpu:
        return [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    own = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return [os.environ.get("CXX", own)]


def use_cache(folder: Path, plugin: str) -> Callable[[], None]:
    """Make ``folder`` the inductor's cache; return a function that restores the environment.

    Raises ``StorageError`` if the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{plugin}.cache_dir: {folder}: {error.strerror or error}") from error
    before = os.environ.get(_CACHE_VARIABLE)
    os.environ[_CACHE_VARIABLE] = str(folder)
    return partial(_restore, before)


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop(_CACHE_VARIABLE, None)
    else:
        os.environ[_CACHE_VARIABLE] = before
