"""Names as MLflow takes them."""

from __future__ import annotations

import functools
import hashlib
import posixpath
import re

LONGEST = 250


@functools.lru_cache(maxsize=4096)
def safe(key: str) -> str:
    """Return a key as MLflow takes it: few characters, not too many of them, and the form of a
    plain relative path. What is safe stays as it is."""
    allowed = re.sub(r"[^\w./ :-]", "_", key, flags=re.ASCII)
    plain = posixpath.normpath(allowed).lstrip("/.") or "_"
    return plain if len(plain) <= LONGEST else _marked(plain, key)


class Names:
    """The safe names of some keys, each of its own: where two would be one, a digest of the key
    tells the later one apart."""

    def __init__(self) -> None:
        self._keys: dict[str, str] = {}

    def of(self, key: str) -> str:
        """Return the name of a key, which is the same whenever the order of the keys is."""
        name = safe(key)
        return name if self._keys.setdefault(name, key) == key else _marked(name, key)


def model_name(checkpoint: str) -> str:
    """Return the name of the logged model of a checkpoint."""
    return re.sub(r"[^\w-]", "_", checkpoint, flags=re.ASCII)


def _marked(name: str, key: str) -> str:
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return f"{name[: LONGEST - 9].rstrip('/ .')}_{digest}"
