"""Follow a metrics file that is being written and may be replaced."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

from fundamentallm import folder


class Tail:
    """The new rows of a file.

    A resumed or rewound run replaces the file by one that begins with the same lines; those are not
    returned again. It stores eight bytes for each line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._position, self._rest = 0, 0, b""
        self._seen: array[int] = array("q")
        self._place = 0

    def rows(self) -> list[folder.Row]:
        """Return the rows since the last call; none if there is no file yet."""
        found = ((line, folder.parse_row(line)) for line in self._lines())
        return [row for line, row in found if row is not None and self._is_new(line)]

    def _lines(self) -> list[bytes]:
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._position:
                self._inode, self._position, self._rest, self._place = status.st_ino, 0, b"", 0
            file.seek(self._position)
            new = file.read()
        self._position += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        return lines

    def _is_new(self, line: bytes) -> bool:
        """Register the next line; return False if the replaced file had it in the same place."""
        place, known = self._place, hash(line)
        self._place += 1
        if self._seen[place : place + 1] == array("q", [known]):
            return False
        del self._seen[place:]
        self._seen.append(known)
        return True
