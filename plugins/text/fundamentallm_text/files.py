"""Which bytes of which files the text is."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fundamentallm import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

NOT_LIBRARY = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "lib2to3", "site-packages", "test", "tests"}
)


@dataclass(frozen=True)
class Extent:
    """The bytes ``start`` to ``stop`` of a file; ``ends`` if they reach the end of it."""

    path: Path
    start: int
    stop: int
    ends: bool = True

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start


def find(paths: Path | Sequence[Path], setting: str) -> list[Path]:
    """Return the files that paths and glob patterns name, each once; a pattern's are sorted.

    Raises ``DataError`` for what is not there; empty files that a pattern finds are left out.
    """
    found: dict[Path, None] = {}
    for path in [paths] if isinstance(paths, Path) else paths:
        if not path.exists() and glob.has_magic(str(path)):
            found.update(dict.fromkeys(_matches(path, setting)))
        else:
            _check(path, setting)
            found[path] = None
    if not found:
        raise DataError(f"{setting}: the list names no file")
    return list(found)


def _matches(pattern: Path, setting: str) -> list[Path]:
    # Path.glob takes no absolute pattern.
    names = glob.glob(str(pattern), recursive=True)  # noqa: PTH207
    found = [path for path in map(Path, sorted(names)) if path.is_file() and path.stat().st_size]
    if not found:
        raise DataError(f"{setting}: no file with anything in it matches {pattern}")
    return found


def _check(path: Path, setting: str) -> None:
    if path.is_dir():
        hint = path / "**" / "*.txt"
        raise DataError(f"{setting}: {path} is a folder; name its files with a pattern: {hint}")
    if not path.exists():
        raise DataError(f"{setting}: there is no file {path}")
    if not path.stat().st_size:
        raise DataError(f"{setting}: {path} is empty")


def standard_library() -> list[Path]:
    """Return the modules of the running interpreter's standard library, without their tests.

    Sorted by a hash of their names: neighbours in the alphabet belong together, and text held out
    at the end should be a sample of everything. What is generated at installation (it differs
    between builds of one version) and what is not UTF-8 is left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(_modules(root), key=lambda name: hashlib.sha256(name.encode()).digest())
    found = [root / name for name in names if _is_text(root / name)]
    if not found:
        raise DataError(f"text.source: this Python has no standard library sources in {root}")
    return found


def _modules(root: Path) -> Iterator[str]:
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in NOT_LIBRARY]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name).relative_to(root).as_posix()


def _is_text(path: Path) -> bool:
    try:
        return bool(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError):
        return False


def extents(paths: Iterable[Path]) -> list[Extent]:
    """Return the whole of each file."""
    return [Extent(path, 0, path.stat().st_size) for path in paths]


def cut(text: Sequence[Extent], size: int) -> tuple[list[Extent], list[Extent]]:
    """Divide text after ``size`` bytes, or up to three earlier: never inside a UTF-8 character."""
    before: list[Extent] = []
    for place, extent in enumerate(text):
        if size < extent.size:
            middle = _boundary(extent, extent.start + size)
            after = [replace(extent, start=middle), *text[place + 1 :]]
            if middle > extent.start:
                before.append(replace(extent, stop=middle, ends=False))
            return before, after
        before.append(extent)
        size -= extent.size
    return before, []


def _boundary(extent: Extent, offset: int) -> int:
    with extent.path.open("rb") as file:
        file.seek(offset - min(3, offset - extent.start))
        around = file.read(offset - file.tell() + 1)
    # In UTF-8, a byte 10xxxxxx continues a character that began up to three bytes before.
    for back, byte in enumerate(reversed(around)):
        if byte & 0xC0 != 0x80:
            return offset - back
    return offset
