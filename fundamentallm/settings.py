"""Settings: the ``[run]`` table, and the core as the host of its plugins.

``compose`` reads settings and makes the plugins they list; ``HOST`` says what they may be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import tomli
from attrs.validators import ge, matches_re, optional

from fundamentallm import host
from fundamentallm.errors import FundamentalError, ReservedNameError, SettingsError
from fundamentallm.folder import environment
from fundamentallm.hookspecs import REQUIRED, Hooks
from fundamentallm.host import Found, Host, Known, Provenance, Source, field, plugin, suggest, walk
from fundamentallm.periods import Period

Role: TypeAlias = Literal["data", "model", "optimizer", "training", "control", "saver", "observer"]
# A plugin that answers one of these hooks changes the data or the weights of a run.
# The order matters: a plugin that answers hooks of several roles has the first one.
ROLES: dict[str, tuple[str, ...]] = {
    "data": ("build_data", "build_tokenizer"),
    "model": ("build_model",),
    "optimizer": ("build_optimizer",),
    "training": (
        "adapt_model",
        "checkpoint_activations",
        "compile_model",
        "distribute_model",
        "collect_batches",
        "weigh_window",
        "train_microbatch",
        "forward",
        "backward",
        "finish_gradients",
        "judge_step",
        "edit_gradients",
        "lr_factor",
        "optimizer_step",
    ),
    "control": (),
    "saver": (),
    "observer": (),
}
# Not read from the plugins themselves: it advises on those that are not installed.
FIRST_PARTY = tomli.loads(Path(__file__).with_name("first_party.toml").read_text("utf-8"))
CORE_METRICS = ("train/loss", "train/tokens", "optim/lr", "val/loss")


def _of_time(_: object, __: object, value: Period) -> None:
    if value.seconds is None:
        raise ValueError(f"expected a time such as '230 minutes', got '{value}'")


@plugin
class RunSettings:
    """The ``[run]`` table: what the loop itself needs to know."""

    length: Period
    """How long to train: a period such as "2000 steps", "3 epochs", "1e9 tokens", "2 hours"."""
    validate_every: Period | None = None
    """How often to validate; the last step is validated in any case, if there is held-out data."""
    validate_first: bool = False
    """Validate before the first step, too: where the untrained model stands."""
    log_every: Period = Period(50)
    """How often metrics become numbers and go to the loggers: the mean since the last time."""
    max_time: Period | None = field(default=None, validator=optional(_of_time))
    """Stop and save, to be resumed, when the command has run so long: a time, such as
    "230 minutes" where a batch system allows four hours."""
    seed: int = field(default=1337, validator=ge(0))
    """The one seed: initial weights, data order, dropout and samples all derive from it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train; "auto" takes the GPU if there is one."""
    threads: int | None = field(default=None, validator=optional(ge(1)))
    """How many threads compute on the CPU; by default as many as torch and the environment
    (``OMP_NUM_THREADS``) choose. Results may depend on it: a resumed run keeps its number."""
    name: str | None = field(default=None, validator=optional(matches_re(r"\w[\w.+-]*")))
    """The run's name, and its folder's; by default that of the settings file."""
    folder: Path = Path("runs")
    """The folder that run folders are made in; the default is one where the command is run."""


class Composed(host.Composed):
    """Checked settings: the ``[run]`` table and the plugins by instance name, in list order."""

    @property
    def run(self) -> RunSettings:
        """The ``[run]`` table."""
        return cast("RunSettings", self.own)


def find_plugins() -> dict[str, list[Found]]:
    """Return the installed plugins by name; more than one under a name is a conflict."""
    return host.find(HOST.name)


def compose(
    settings: Path | str | Mapping[str, Any],
    *,
    overrides: Iterable[str] = (),
    plugins: Sequence[object] = (),
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
) -> Composed:
    """Read settings, make the plugins they list, and check that all fits together.

    ``overrides`` are strings such as ``"run.length=100"``; ``plugins`` are ready instances to use
    in addition to the listed ones; ``add`` and ``remove`` change the list. Raises ``SettingsError``
    with every mistake. Nothing is created, and no data is read.
    """
    source = host.read(settings, overrides)
    source.recorded = _recorded(source.path)
    made = host.compose(HOST, source, plugins=plugins, add=add, remove=remove)
    return Composed(made.host, made.own, made.plugins, made.source, made.brought)


def _recorded(settings: Path | None) -> dict[str, Provenance]:
    """Return where the plugins of a run came from, if the settings lie in its folder."""
    table = environment(settings.parent).get("plugins") if settings else None
    facts = table.items() if isinstance(table, dict) else ()
    found = {name: Provenance.from_json(fact) for name, fact in facts}
    return {name: one for name, one in found.items() if one is not None}


def order(plugins: Mapping[str, object]) -> list[str]:
    """Return the names in list order, moved only as far as ``before``/``after`` demand."""
    return host.order(HOST, plugins)


def hook_methods(cls: type) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yield the name, options and function of every method marked as a hook."""
    return host.hook_methods(HOST, cls)


def role_of(plugin: object) -> Role:
    """Return the role of a plugin (or of its class): declared as ``role``, else implied by its
    hooks. See ``plugin``."""
    return cast("Role", host.role_of(HOST, plugin if isinstance(plugin, type) else type(plugin)))


def answering(plugins: Mapping[str, object], hook: str) -> str | None:
    """Return the name of the plugin that answers an exclusive hook, and not only wraps it; None if
    the core's default answers."""
    return next(iter(host.answering(HOST, plugins).get(hook, [])), None)


def ends_the_run(hook: str, error: Exception) -> bool:
    """Return whether an error of an observer ends the run: wrong settings and reserved names always
    do, and before the first step also every other error that its user can act on."""
    kinds = FundamentalError if hook in ("on_run_start", "on_train_start") else SettingsError
    return isinstance(error, kinds | ReservedNameError)


def check_values(source: Source, built: Mapping[str, Any]) -> None:
    """Note which settings ask for what the plugins do not bring: metrics, epochs."""
    produced = [*CORE_METRICS, *(m for p in built.values() for m in getattr(p, "produces", ()))]
    data = answering(built, "build_data")
    # Data that does not declare it may have epochs: if not, the period raises an error in the run.
    epochs = data is None or getattr(built[data], "has_epochs", True)
    for key, value in walk(built):
        if isinstance(value, Period) and value.unit == "epochs" and not epochs:
            source.blame(key, "the data has no epochs")
    for name, wanted in ((name, getattr(one, "monitor", None)) for name, one in built.items()):
        if isinstance(wanted, str) and not any(fnmatchcase(wanted, p) for p in produced):
            text = (
                f"nothing listed produces {wanted!r}{suggest(wanted, produced)}; "
                "a plugin names the metrics that it logs in `produces`"
            )
            source.blame((name, "monitor"), text)


HOST = Host(
    name="fundamentallm",
    version=version("fundamentallm"),
    hooks=Hooks,
    table=RunSettings,
    required=REQUIRED,
    known={name: Known(**facts) for name, facts in FIRST_PARTY["plugins"].items()},
    check=check_values,
    error=SettingsError,
    fatal=ends_the_run,
    roles=ROLES,
    # Every plugin must close what it opened, even if another one fails at the end.
    to_the_end=("on_train_end",),
)
