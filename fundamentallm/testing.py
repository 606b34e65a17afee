"""The kit that plugin authors test with: tiny real runs, a recorder, and a contract to pass.

Installing fundamentallm makes the fixture ``tiny_run`` known to pytest. A plugin's suite is at
least this, which is some ten tests::

    class TestContract(PluginContract):
        plugin = EarlyStopping
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import pytest

from fundamentallm import (
    HOOKS,
    Batch,
    Composed,
    Data,
    Hooks,
    Period,
    Progress,
    Run,
    SettingsError,
    Snapshot,
    attribute_docs,
    compose,
    field,
    ge,
    hookimpl,
    plugin,
    plugin_name,
    setting_fields,
)
from fundamentallm.hookspecs import REQUIRED
from fundamentallm.host import Source, build, class_problems, get_state, plain, set_state, structure
from fundamentallm.settings import HOST, hook_methods

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

HEAVY = ("torch", "numpy", "mlflow", "matplotlib", "pandas", "tokenizers", "transformers")


@plugin
class TinyData:
    """Sixteen made-up samples for a regression, in batches, and a held-out batch."""

    batch_size: int = field(default=4, validator=ge(1))
    """Samples in a micro-batch."""

    @hookimpl
    def build_data(self, run: Run) -> Data:
        return TinySamples(self.batch_size, run.device)


class TinySamples:
    """Samples that are a pure function of their index."""

    epoch_samples = 16
    fingerprint = "tiny"

    def __init__(self, batch_size: int, device: str) -> None:
        self.batch_size, self.device = batch_size, device

    def batches(self, progress: Progress) -> Iterator[Batch]:
        first = progress.samples
        while True:
            yield self.batch(range(first, first + self.batch_size))
            first += self.batch_size

    def batch(self, indices: range) -> Batch:
        """Return the samples at some indices: inputs of shape (n, 8), targets of shape (n, 1)."""
        import torch

        index = torch.tensor([i % self.epoch_samples for i in indices], dtype=torch.float32)
        inputs = torch.sin(index[:, None] * torch.arange(1.0, 9.0) + 0.5)
        pair = (inputs.to(self.device), inputs.sum(1, keepdim=True).tanh().to(self.device))
        return Batch(pair, len(indices), len(indices), len(indices), first=indices[0])

    def validation(self) -> Mapping[str, list[Batch]]:
        return {"val": [self.batch(range(1000, 1000 + 2 * self.batch_size))]}


@plugin
class TinyModel:
    """A network of two layers with dropout; ``forward(inputs, targets)`` is its loss."""

    dropout: float = field(default=0.1, validator=ge(0))
    """Share of the hidden units that training drops, so that random state matters."""

    @hookimpl
    def build_model(self) -> nn.Module:
        from torch import nn

        class Tiny(nn.Module):
            def __init__(self, dropout: float) -> None:
                super().__init__()
                self.hidden = nn.Linear(8, 16)
                self.dropout = nn.Dropout(dropout)
                self.out = nn.Linear(16, 1)

            def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                hidden = self.dropout(nn.functional.gelu(self.hidden(inputs)))
                return nn.functional.mse_loss(self.out(hidden), targets)

        return Tiny(self.dropout)


@plugin
class TinyOptimizer:
    """Plain AdamW."""

    lr: float = 0.01
    """Base learning rate."""

    @hookimpl
    def build_optimizer(self, run: Run) -> Optimizer:
        import torch

        return torch.optim.AdamW(run.model.parameters(), lr=self.lr)


TINY: dict[str, Callable[[], object]] = {
    "build_data": TinyData,
    "build_model": TinyModel,
    "build_optimizer": TinyOptimizer,
}


def tiny_parts(plugins: list[object]) -> list[object]:
    """Return a tiny data source, model and optimizer, as far as ``plugins`` do not bring them."""
    answered = {
        hook
        for one in plugins
        for hook, options, _ in hook_methods(type(one))
        if not options["wrapper"]
    }
    return [TINY[hook]() for hook in REQUIRED if hook not in answered]


def compose_tiny(
    *plugins: str | object, settings: Mapping[str, Any] | None = None, **run: Any
) -> Composed:
    """Compose a tiny run of names and instances; ``run`` is its ``[run]`` table."""
    names = [one for one in plugins if isinstance(one, str)]
    objects = [one for one in plugins if not isinstance(one, str)]
    tables = {"plugins": names, **(settings or {})}
    tables["run"] = {"length": 4, "log_every": 2, "device": "cpu", **tables.get("run", {}), **run}
    try:
        return compose(tables, plugins=objects)
    except SettingsError as error:
        missing = [hook for hook in REQUIRED if any(p.startswith(hook) for p in error.problems)]
        return compose(tables, plugins=[*objects, *(TINY[hook]() for hook in missing)])


TinyRun = Callable[..., Run]


@pytest.fixture
def tiny_run(tmp_path: Path) -> TinyRun:
    """Train a tiny real run of plugin names and instances, in seconds or less.

    ``tiny_run("jsonl", GradClip(max_norm=1.0), length=8)``: data, model and optimizer that
    nothing listed brings are tiny ones. ``settings`` holds further tables by name, ``run_dir``
    the folder (by default ``tmp_path / "run"``), and all other words are settings of the run.
    """
    from fundamentallm import train

    def start(
        *plugins: str | object,
        settings: Mapping[str, Any] | None = None,
        run_dir: Path | None = None,
        trace: Any = None,
        **run: Any,
    ) -> Run:
        tracing = [] if trace is None else [Traced(trace=trace)]
        composed = compose_tiny(*plugins, *tracing, settings=settings, **run)
        return train(composed, run_dir=run_dir or tmp_path / "run")

    return start


@plugin
class Traced:
    """Puts what ``trace`` makes of the bound hooks in their place, before anything is built."""

    trace: Any

    @hookimpl
    def on_run_start(self, run: Run) -> None:
        run.hook = self.trace(run.hook)


class Recorder:
    """Records the hook calls of a run that follow ``on_run_start``: pass it as ``trace``.

    ``names`` are the hooks in the order of their calls; ``calls`` pairs them with arguments.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, hooks: Hooks) -> Hooks:
        bound = {name: self._recorded(name, getattr(hooks, name)) for name in HOOKS}
        return cast("Hooks", SimpleNamespace(**bound))

    def _recorded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def record(**given: Any) -> Any:
            self.calls.append((name, {k: v for k, v in given.items() if k != "run"}))
            return call(**given)

        return record

    @property
    def names(self) -> list[str]:
        return [hook for hook, _ in self.calls]


@plugin
class Memory:
    """Keeps the snapshot of one step as a checkpoint would, and hands it to a run that continues.

    Listed in a run and then, the same object, in another, it makes the other go on from that step.
    """

    step: int = 0
    """The step whose snapshot is kept."""
    later: int | None = None
    """The step in which the run goes back to the one that is kept, once."""
    kept: Snapshot | None = field(init=False, default=None)
    gone_back: bool = field(init=False, default=False)

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if run.progress.step == self.step:
            self.kept = copy.deepcopy(run.snapshot())

    @hookimpl
    def read_checkpoint(self) -> Snapshot | None:
        return copy.deepcopy(self.kept)

    @hookimpl
    def judge_step(self, run: Run) -> str | None:
        if self.gone_back or run.progress.step + 1 != self.later:
            return None
        self.gone_back = True
        run.rewind("latest")
        return "go back"


def weights(run: Run) -> dict[str, Tensor]:
    """Return copies of a run's weights on the CPU, to compare bit by bit."""
    return {name: tensor.detach().cpu().clone() for name, tensor in run.model.state_dict().items()}


def assert_same_weights(one: Run, other: Run) -> None:
    """Fail unless two runs ended with bitwise equal weights."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not bool(mine[name].equal(theirs[name]))]
    assert not different, f"these weights differ: {', '.join(different)}"


class PluginContract:
    """What every plugin promises. Subclass it in the plugin's suite and name the class."""

    plugin: ClassVar[type]
    needs: ClassVar[dict[str, Any]] = {}
    """The settings it cannot do without; those of ``instance()`` in the tests here."""
    companions: ClassVar[tuple[Callable[[], object], ...]] = ()
    """What makes the plugins that it needs beside it in a run."""

    def instance(self) -> Any:
        """Build the plugin as a settings file with what it needs would."""
        return structure(self.needs, self.plugin)

    def test_importing_it_imports_nothing_heavy(self) -> None:
        code = f"import sys, {self.plugin.__module__}; print(*sys.modules)"
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not set(HEAVY) & set(done.stdout.split())

    def test_builds_from_an_empty_table_or_names_what_it_needs(self) -> None:
        problems = _problems(self.plugin, {})
        missing = [name for name in self.needs if _required(self.plugin, name)]
        for name in missing:
            assert any(f".{name}: is missing" in text for text in problems), problems
        assert problems or not missing

    def test_builds_from_what_it_needs(self) -> None:
        assert not _problems(self.plugin, self.needs)

    def test_rejects_unknown_settings(self) -> None:
        (problem,) = _problems(self.plugin, {**self.needs, "no_such_setting": 1})
        assert "no_such_setting: unknown setting" in problem

    def test_rejects_a_table_in_place_of_every_setting(self) -> None:
        for name in setting_fields(self.plugin):
            wrong: Any = {"no": {"such": {"thing": []}}}
            problems = _problems(self.plugin, {**self.needs, name: wrong})
            assert any(f".{name}" in text for text in problems), name

    def test_describes_itself_and_every_setting(self) -> None:
        assert (self.plugin.__doc__ or "").strip()
        assert set(setting_fields(self.plugin)) <= set(attribute_docs(self.plugin))

    def test_its_hooks_are_those_of_the_contract(self) -> None:
        assert list(class_problems(HOST, self.plugin)) == []
        assert list(hook_methods(self.plugin)), "it hears no hook"

    def test_its_settings_survive_a_settings_file(self) -> None:
        written = plain(self.instance())
        assert plain(structure(written, self.plugin)) == written

    def test_its_state_survives_a_checkpoint(self, tiny_run: TinyRun) -> None:
        trained, resumed = self.instance(), self.instance()
        tiny_run(trained, *(make() for make in self.companions))
        kept = get_state(trained)
        set_state(resumed, copy.deepcopy(kept))
        assert _comparable(get_state(resumed)) == _comparable(kept)

    def test_its_place_in_the_list_does_not_matter(self, tiny_run: TinyRun, tmp_path: Path) -> None:
        runs = []
        for place in ("first", "last"):
            others = [make() for make in self.companions]
            listed = [self.instance(), *others] if place == "first" else [*others, self.instance()]
            listed = listed if place == "first" else [*tiny_parts(listed), *listed]
            runs.append(tiny_run(*listed, run_dir=tmp_path / place))
        assert_same_weights(*runs)
        assert runs[0].outcome == runs[1].outcome

    def test_a_resumed_run_ends_with_the_same_bits(self, tiny_run: TinyRun) -> None:
        memory = Memory(step=2)
        listed = [self.instance(), *(make() for make in self.companions)]
        if any(hook == "read_checkpoint" for one in listed for hook, *_ in hook_methods(type(one))):
            return  # it brings the checkpoints, and tests them
        whole = tiny_run(*listed, memory)
        again = [self.instance(), *(make() for make in self.companions)]
        assert_same_weights(whole, tiny_run(*again, memory))


def _problems(cls: type, values: Mapping[str, Any]) -> list[str]:

    source = Source(values={"it": dict(values)})
    build(cls, source.values["it"], source, (plugin_name(cls),))
    return source.problems


def _comparable(state: Any) -> str:
    """Write a state out in full; what JSON cannot hold and is no tensor is a mistake."""

    def tensor(value: Any) -> Any:
        return [str(value.dtype), value.tolist()]

    return json.dumps(state, default=tensor, sort_keys=True)


def _required(cls: type, name: str) -> bool:
    import attrs

    return setting_fields(cls)[name].default is attrs.NOTHING


def period(text: str | int) -> Period:
    """Shorthand for ``Period.parse``."""
    return Period.parse(text)
