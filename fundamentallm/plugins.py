"""The core as the host of its plugins: their entry points, hooks, tables and checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import tomli

import plugtable
from fundamentallm.errors import SettingsError
from fundamentallm.hookspecs import REQUIRED, Hooks
from fundamentallm.periods import Period
from fundamentallm.settings import RunSettings
from plugtable import Found, Host, Source, suggest, walk

CORE_METRICS = ("train/loss", "train/tokens", "optim/lr", "val/loss")


class Composed(plugtable.Composed):
    """Checked settings: the ``[run]`` table and the plugins by instance name, in list order."""

    @property
    def run(self) -> RunSettings:
        """The ``[run]`` table."""
        return cast("RunSettings", self.own)


def find_plugins() -> dict[str, list[Found]]:
    """Return the installed plugins by name; more than one under a name is a conflict."""
    return plugtable.find(HOST.name)


def compose(
    settings: Path | str | Mapping[str, Any], *, overrides: Iterable[str] = (),
    plugins: Sequence[object] = (), add: Sequence[str] = (), remove: Sequence[str] = (),
) -> Composed:  # fmt: skip
    """Read settings, make the plugins they list, and check that all fits together.

    ``overrides`` are strings such as ``"run.length=100"``; ``plugins`` are ready instances to use
    beside the listed ones; ``add`` and ``remove`` change the list. Raises ``SettingsError`` with
    every mistake; nothing is created, no data is read.
    """
    source = plugtable.read(settings, overrides)
    made = plugtable.compose(HOST, source, plugins=plugins, add=add, remove=remove)
    return Composed(made.host, made.own, made.plugins, made.source, made.brought)


def order(plugins: Mapping[str, object]) -> list[str]:
    """Return the names in list order, moved only as far as ``before``/``after`` demand."""
    return plugtable.order(HOST, plugins)


def hook_methods(cls: type) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield the name, options and function of every method marked as a hook."""
    return plugtable.hook_methods(HOST, cls)


def check_values(source: Source, built: Mapping[str, Any]) -> None:
    """Note which settings ask for what the plugins do not bring: metrics, epochs."""
    produced = [*CORE_METRICS, *(m for p in built.values() for m in getattr(p, "produces", ()))]
    data = [one for one in built.values() if hasattr(one, "build_data")]
    epochs = all(getattr(one, "has_epochs", True) for one in data)
    for key, value in walk(built):
        if isinstance(value, Period) and value.unit == "epochs" and not epochs:
            source.blame(key, "the data has no epochs")
    for name, wanted in ((name, getattr(one, "monitor", None)) for name, one in built.items()):
        if isinstance(wanted, str) and not any(fnmatchcase(wanted, p) for p in produced):
            text = f"nothing listed produces {wanted!r}{suggest(wanted, produced)}"
            source.blame((name, "monitor"), text)


HOST = Host(
    name="fundamentallm", hooks=Hooks, table=RunSettings, required=REQUIRED,
    known=tomli.loads(Path(__file__).with_name("first_party.toml").read_text("utf-8")),
    check=check_values, error=SettingsError, fatal=(SettingsError,), to_the_end=("on_train_end",),
)  # fmt: skip
