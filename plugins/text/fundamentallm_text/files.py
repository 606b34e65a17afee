"""Find the files of a corpus, and divide them into byte ranges."""

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
class FileRange:
    """The bytes ``start`` to ``stop`` of a file; ``ends`` if these include the end of the file."""

    path: Path
    start: int
    stop: int
    ends: bool = True

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.stop - self.start


def find(paths: Path | Sequence[Path], setting: str) -> list[Path]:
    """Return the files that paths and glob patterns name, each once; a pattern's are sorted.

    ``setting`` begins errors. Empty files that a pattern finds are skipped. Raises ``DataError``
    for a missing or empty file, a folder, or a pattern that matches nothing.
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
        raise DataError(f"{setting}: no file that is not empty matches {pattern}")
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

    They are sorted by a hash of their names, so that the text held out at the end is a sample of
    all modules. Excluded are files that the installation generates (they differ between builds of
    one version) and files that are not UTF-8.
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


def whole_files(paths: Iterable[Path]) -> list[FileRange]:
    """Return the whole of each file."""
    return [FileRange(path, 0, path.stat().st_size) for path in paths]


def split_files(text: Sequence[FileRange], size: int) -> tuple[list[FileRange], list[FileRange]]:
    """Split text after ``size`` bytes, or up to three earlier: never inside a UTF-8 character."""
    before: list[FileRange] = []
    for index, part in enumerate(text):
        if size < part.size:
            middle = _boundary(part, part.start + size)
            after = [replace(part, start=middle), *text[index + 1 :]]
            if middle > part.start:
                before.append(replace(part, stop=middle, ends=False))
            return before, after
        before.append(part)
        size -= part.size
    return before, []


def _boundary(part: FileRange, offset: int) -> int:
    with part.path.open("rb") as file:
        file.seek(offset - min(3, offset - part.start))
        last_bytes = file.read(offset - file.tell() + 1)
    # In UTF-8, a byte 10xxxxxx continues a character that began up to three bytes earlier.
    for back, byte in enumerate(reversed(last_bytes)):
        if byte & 0xC0 != 0x80:
            return offset - back
    return offset
