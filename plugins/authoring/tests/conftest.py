"""Sample plugins for the tests, as local files: what users write."""

from __future__ import annotations

from pathlib import Path

import pytest

EVERYTHING = '''
"""One setting of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fundamentallm import (
    Period, deep_iterable, field, ge, gt, hookimpl, in_, le, lt, matches_re, optional, plugin, table,
)


@table
class Part:
    """A part of it."""

    width: int = field(validator=ge(1))
    """How wide."""
    label: str = "none"
    """What it says."""


@plugin
class Everything:
    """One setting of ``every`` kind."""

    count: int = field(validator=[ge(1), le(9)])
    """How many."""
    share: float = field(default=0.5, validator=[gt(0), lt(1)])
    """How much."""
    on: bool = True
    """Whether."""
    word: str = "a"
    """Which."""
    code: str = field(default="ab", validator=matches_re("[ab]+"))
    """As and bs | nothing else."""
    place: Path = Path("here")
    """Where."""
    mode: Literal["min", "max", 3] = "min"
    """How."""
    size: int = field(default=2, validator=in_([1, 2, 4]))
    """One of some."""
    every: Period | None = None
    """How often."""
    either: int | str = 1
    """One or the other."""
    limit: float | None = field(default=None, validator=optional(ge(0)))
    """At most."""
    names: list[str] = field(factory=list)
    """Who."""
    sizes: list[int] = field(factory=list, validator=deep_iterable(gt(0)))
    """How large."""
    rates: dict[str, float] = field(factory=dict)
    """How fast, by name."""
    part: Part | None = None
    """A part."""
    parts: list[Part] = field(factory=list)
    """Several parts."""

    @hookimpl
    def on_train_start(self) -> None:
        """Note the start. And nothing else."""

    @hookimpl(wrapper=True)
    def forward(self):
        return (yield)
'''

TINY = '''
"""Data, model and optimizer of a run of milliseconds."""

from fundamentallm import plugin
from fundamentallm.testing import TinyParts


@plugin
class Tiny(TinyParts):
    """All that a run needs."""

'''


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the local plugins ``everything.py`` and ``tiny.py``."""
    folder = tmp_path_factory.mktemp("samples")
    (folder / "everything.py").write_text(EVERYTHING)
    (folder / "tiny.py").write_text(TINY)
    return folder


@pytest.fixture(scope="session")
def everything(samples: Path) -> type:
    """The class ``Everything``."""
    from fundamentallm import compose

    plugins = [str(samples / name) for name in ("everything.py", "tiny.py")]
    made = compose({"plugins": plugins, "everything": {"count": 1}, "run": {"length": 1}})
    return type(made.plugins["everything"])
