"""The local Python files that a run uses: which they are, copies of them, and what has changed.

These are the files of plugins that no installed distribution brings, and the modules in the same
folder that they import, directly or through each other. What a file imports is read from its text,
so that imports in hooks that have not run yet are included. The modules that the process has
imported from the folder are added, since a text does not show ``importlib.import_module(name)``.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from fundamentallm.errors import StorageError
from fundamentallm.folder import CODE, environment
from fundamentallm.host import local


def local_files(plugins: Iterable[object]) -> dict[Path, Path]:
    """Return the local files behind some plugins, each with the folder of its plugin's file."""
    found: dict[Path, Path] = {}
    entries = metadata.entry_points(group="fundamentallm")
    packages = {"fundamentallm", *(entry.module.partition(".")[0] for entry in entries)}
    for cls in map(type, plugins):
        path = _file_of(cls, packages)
        if path is None:
            continue
        left, home = [path], path.parent
        if _is_listed_file(cls):
            left += _in_memory(home, packages)
        # Modules may import each other in a circle: each file is followed once.
        while left:
            one = left.pop()
            if one not in found:
                found[one] = home
                left += [near for near in _imported(one, home) if near.is_file()]
    return found


def code_changes(folder: Path) -> list[str]:
    """Return a line for each local file that is not what it was when the run was last started."""
    lines = []
    for path, facts in _recorded(folder).items():
        now = _digest(Path(path))
        if now != facts["sha256"]:
            how = "has changed" if now else "cannot be read any more"
            lines.append(
                f"{path} {how} since the run was started; its copy is {folder / facts['copy']}"
            )
    return lines


def keep_code(folder: Path, files: dict[Path, Path], step: int) -> dict[str, Any]:
    """Copy files into ``code/`` of a run folder; return what to record of them, by their paths.

    Copies of a file that has changed since or is used no longer are moved to
    ``code/until-step-…``, unless the run was started at this step before.
    """
    homes, kept = dict[Path, str](), dict[str, Any]()
    try:
        for path, home in sorted(files.items()):
            if home not in homes:
                # Two folders of plugins may have one name.
                taken = sum(known.name == home.name for known in homes)
                homes[home] = (home.name or "root") + (f"-{taken + 1}" if taken else "")
            content = path.read_bytes()
            copy = Path(CODE, homes[home], path.relative_to(home))
            kept[str(path)] = {"sha256": hashlib.sha256(content).hexdigest(), "copy": str(copy)}
        # First: the copy of a file that has changed would be overwritten below.
        _set_aside(folder, kept, f"until-step-{step:08}")
        for known, facts in kept.items():
            target = folder / facts["copy"]
            if _digest(target) != facts["sha256"]:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(Path(known).read_bytes())
    except OSError as error:
        text = f"{error.filename or folder}: cannot be copied into the run folder: {error.strerror}"
        raise StorageError(text) from error
    return kept


def _set_aside(folder: Path, kept: dict[str, Any], name: str) -> None:
    for path, facts in _recorded(folder).items():
        old = folder / facts["copy"]
        target = folder / CODE / name / Path(facts["copy"]).relative_to(CODE)
        if kept.get(path) != facts and old.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            old.rename(target)


def _recorded(folder: Path) -> dict[str, dict[str, str]]:
    """Return what is recorded of each local file, as far as it makes sense."""
    found = environment(folder).get("code")
    # The record may be damaged or edited: a path must not lead out of ``code/``.
    return {
        path: facts
        for path, facts in (found.items() if isinstance(found, dict) else ())
        if isinstance(facts, dict)
        and isinstance(facts.get("sha256"), str)
        and Path(str(facts.get("copy"))).parts[:1] == (CODE,)
        and ".." not in Path(facts["copy"]).parts
    }


def _digest(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _file_of(cls: type, packages: set[str]) -> Path | None:
    """Return the file of a class; None if it has none or an installed package brings it."""
    if not _is_listed_file(cls) and cls.__module__.partition(".")[0] in packages:
        return None  # the package may be installed as editable, and so lie anywhere
    try:
        path = Path(inspect.getfile(cls)).resolve()
    except (OSError, TypeError):  # typed into an interpreter
        return None
    installed = (*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("stdlib"))
    return None if any(map(path.is_relative_to, installed)) or not path.is_file() else path


def _is_listed_file(cls: type) -> bool:
    """Return whether a plugin came from a file that the settings list, not as an object."""
    return cls.__module__.startswith(f"{local.__name__}.")


def _in_memory(home: Path, packages: set[str]) -> Iterator[Path]:
    """Yield the files of the modules that the process has imported from a folder."""
    tops = {name.partition(".")[0] for name in sys.modules} - packages
    # First the names: to resolve the file of each of thousands of modules would take long.
    near = {top for top in tops if (home / top).is_dir() or (home / f"{top}.py").is_file()}
    for name, module in sys.modules.copy().items():
        words, file = name.split("."), getattr(module, "__file__", None)
        if words[0] in near and file and (path := Path(file).resolve()) in _places(home, words):
            yield path


def _imported(path: Path, home: Path) -> Iterator[Path]:
    """Yield where modules that a file imports would be, if they were local."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _places(home, alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            # The first ".." leads from the file to its folder, which one dot means.
            base = Path(path, *[".."] * node.level).resolve() if node.level else home
            words = node.module.split(".") if node.module else []
            for alias in node.names:  # each may be a module of a package
                yield from _places(base, [*words, alias.name])


def _places(base: Path, words: list[str]) -> Iterator[Path]:
    for count in range(1, len(words) + 1):
        module = base.joinpath(*words[:count])
        yield module.with_suffix(".py")
        yield module / "__init__.py"
