"""Tiny real runs: a data source, a model and an optimizer that train in a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fundamentallm import (
    Batch,
    Composed,
    Data,
    Period,
    Progress,
    Run,
    SettingsError,
    compose,
    field,
    ge,
    hookimpl,
    plugin,
)
from fundamentallm.hookspecs import REQUIRED
from fundamentallm.host import Mistake
from fundamentallm.settings import hook_methods

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


@plugin
class TinyData:
    """Sixteen made-up samples for a regression, in batches, and a held-out batch."""

    batch_size: int = field(default=4, validator=ge(1))
    """Samples in a micro-batch."""

    @hookimpl
    def build_data(self, run: Run) -> Data:
        return TinySamples(self.batch_size, run.device, (run.data_rank, run.data_size))


class TinySamples:
    """Samples that are a pure function of their index.

    ``part`` is this process's part of every batch, and the number of parts.
    """

    epoch_samples = 16
    fingerprint = "tiny"

    def __init__(self, batch_size: int, device: str, part: tuple[int, int] = (0, 1)) -> None:
        self.batch_size, self.device, self.part = batch_size, device, part

    def batches(self, progress: Progress) -> Iterator[Batch]:
        first = progress.samples
        while True:
            yield self.batch(range(first, first + self.batch_size))
            first += self.batch_size

    def batch(self, indices: range) -> Batch:
        """Return the samples at some indices: inputs of shape (n, 8), targets of shape (n, 1)."""
        import torch

        count, (rank, parts) = len(indices), self.part
        ours = indices[count * rank // parts : count * (rank + 1) // parts]
        # A process without a sample takes part with one that has no weight.
        rows = ours or indices[:1]
        index = torch.tensor([i % self.epoch_samples for i in rows], dtype=torch.float32)
        inputs = torch.sin(index[:, None] * torch.arange(1.0, 9.0) + 0.5)
        pair = (inputs.to(self.device), inputs.sum(1, keepdim=True).tanh().to(self.device))
        return Batch(pair, len(ours), count, count, first=rows[0], total=count)

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


@plugin
class TinyParts:
    """The tiny data, model and optimizer as one plugin, to subclass in a local file of plugins."""

    @hookimpl
    def build_data(self, run: Run) -> Data:
        return TinyData().build_data(run)

    @hookimpl
    def build_model(self) -> nn.Module:
        return TinyModel().build_model()

    @hookimpl
    def build_optimizer(self, run: Run) -> Optimizer:
        return TinyOptimizer().build_optimizer(run)


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
        found = [one for one in error.mistakes if isinstance(one, Mistake)]
        missing = [TINY[one.hook]() for one in found if one.kind == "required"]
        return compose(tables, plugins=[*objects, *missing])


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


def period(text: str | int) -> Period:
    """Shorthand for ``Period.parse``."""
    return Period.parse(text)
