"""Import local plugin files as modules that can import files of their folder, also in workers.

The module of ``<folder>/noise.py`` is ``fundamentallm.host.local.noise``: this module is its
package. While the settings that list the file are in use, ``folder`` is the last entry of
``sys.path``. So the file can import modules of its folder, and none of them hides an installed
module. Worker processes get a copy of ``sys.path``, so that they can import the same modules, also
to unpickle objects of their classes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import attrs

__path__ = sys.path[::-1]  # in a worker process: the folders of local plugins are the last ones


@attrs.define
class _Folder:
    """A folder of local plugins, and the modules that were imported from it."""

    path: Path
    before: set[str]
    """The modules that were there already when the folder was first used."""
    modules: dict[str, ModuleType] = attrs.field(factory=dict)

    def put_in(self) -> None:
        """Make its modules importable, those that were imported before with their state."""
        sys.path.append(str(self.path))
        sys.modules.update(self.modules)

    def take_out(self) -> None:
        """Remove its modules: another folder may have others under the same names."""
        if str(self.path) in sys.path:
            sys.path.remove(str(self.path))
        tops = {name for name in sys.modules if "." not in name} - self.before
        own = {name for name in tops if self.path in (_file(name).parent, _home(name))}
        self.modules = {
            name: module for name, module in sys.modules.items() if name.partition(".")[0] in own
        }
        for name in self.modules:
            del sys.modules[name]


_known: dict[Path, _Folder] = {}
_used: list[_Folder] = []


def use(folders: Iterable[Path]) -> None:
    """Make the modules in these folders importable, and those in earlier ones no longer."""
    ours = {str(one.path) for one in _used}
    # A folder that was importable already, such as that of a script, needs nothing.
    there = set(sys.path) - ours
    wanted = [f for f in dict.fromkeys(map(Path.resolve, folders)) if str(f) not in there]
    if [one.path for one in _used] == wanted and ours <= set(sys.path):
        return
    for one in _used:
        one.take_out()
    _used.clear()
    for path in wanted:
        _used.append(_known.setdefault(path, _Folder(path, set(sys.modules))))
        _used[-1].put_in()


_loaded: dict[Path, tuple[bytes, ModuleType]] = {}
"""The content and the module of each local plugin file that was imported, by its path."""


def load(path: Path) -> ModuleType:
    """Import a local plugin file; one that was imported before only if its content has changed.

    So each class exists once, however often settings are composed in a process.
    """
    name, content = f"{__name__}.{path.stem}", path.read_bytes()
    known, module = _loaded.get(path.resolve(), (None, None))
    if module is None or known != content:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[name] = module  # where attrs looks for the types that annotations name
        # Not by the loader: its cached bytecode hides a change that keeps size and second.
        exec(compile(content, path, "exec", dont_inherit=True), module.__dict__)  # noqa: S102
        _loaded[path.resolve()] = content, module
    # A file of the same name in another folder may have been imported since.
    sys.modules[name] = module
    return module


def _file(name: str) -> Path:
    return Path(getattr(sys.modules[name], "__file__", None) or "/")


def _home(name: str) -> Path | None:
    """Return the folder that a package lies in; None for a module that is one file."""
    file = _file(name)
    return file.parent.parent if file.name == "__init__.py" else None
