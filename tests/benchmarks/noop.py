"""A model that does almost nothing, so that the cost of a step without the model can be measured.

``python noop.py run`` and ``python noop.py handwritten`` train it both ways. The other
scripts of this folder measure both through ``Marks``, which the source of batches calls at chosen
steps, at the same place in both loops.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import handwritten
import torch
from torch import Tensor, nn

from fundamentallm import Batch, Progress, Run, hookimpl, plugin, train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Marks = Mapping[int, Callable[[], None]]

STEPS = 101
# Batch 50 is taken in the 51st step, and the row of step 50 is written before that: a log period,
# and as much of it as has no row.
PERIOD, BETWEEN = (50, 100), (51, 99)

PLUGINS = ["adamw", "grad_clip", "lr_schedule"]
EIGHT = ["accumulate", "checkpoint", "archive", "sample", "poem", "jsonl", "console", "progress"]
SETTINGS: dict[str, Any] = {
    "plugins": PLUGINS + EIGHT,
    "run": {"length": STEPS, "log_every": handwritten.LOG_EVERY, "device": "cpu"},
    "adamw": {
        "lr": handwritten.LR,
        "beta1": handwritten.BETAS[0],
        "beta2": handwritten.BETAS[1],
        "weight_decay": handwritten.WEIGHT_DECAY,
    },
    "grad_clip": {"max_norm": handwritten.MAX_NORM},
    "lr_schedule": {"warmup": f"{handwritten.WARMUP} steps", "decay_to": handwritten.DECAY_TO},
    "accumulate": {"microbatches": 1},
    "checkpoint": {"every": handwritten.SAVE_EVERY, "save_final": False},
    "archive": {
        "plugin": "checkpoint",
        "every": handwritten.ARCHIVE_EVERY,
        "save_final": False,
    },
    "sample": {"every": handwritten.SAMPLE_EVERY, "max_tokens": 1},
    "poem": {"plugin": "sample", "every": handwritten.POEM_EVERY, "max_tokens": 1},
}


# The plugins that a careful user of a long run also lists.
CARE = {
    "amp": {},
    "guard": {},
    "ema": {"decay": handwritten.EMA_DECAY},
    "throughput": {"table": False},
    "early_stopping": {"monitor": "train/loss"},
    "validation": {},
    "crash_report": {},
    "gc": {"every": handwritten.COLLECT_EVERY},
    "grad_stats": {},
}
FULLY = {"plugins": [*PLUGINS, *EIGHT, *CARE], **CARE}


class Model(nn.Module):
    """One small linear layer, and a loss."""

    context_length = 8

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        with torch.no_grad():
            for parameter in self.parameters():
                numbers = torch.linspace(-1, 1, parameter.numel())
                parameter.copy_(numbers.view_as(parameter))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.linear(inputs), targets)

    def logits(self, tokens: Tensor) -> Tensor:
        """Score next tokens, so that the model can be sampled from."""
        return torch.zeros(*tokens.shape, Letters.vocab_size)


class Letters:
    """A tokenizer of bytes."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def prepared() -> tuple[Tensor, Tensor]:
    """Return inputs and targets, each (4, 8)."""
    inputs = torch.linspace(-1, 1, 32).view(4, 8)
    return inputs, inputs.sin()


def batches(item: Any, marks: Marks) -> Iterator[Any]:
    """Yield ``item`` without end; before that of step ``n`` call what is marked with ``n``."""
    for step in itertools.count():
        if step in marks:
            marks[step]()
        yield item


class Repeated:
    """Data that are one micro-batch, over and over."""

    epoch_samples = None
    fingerprint = "repeated"
    tokenizer = Letters()

    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def batches(self, progress: Progress) -> Iterator[Batch]:
        pair = prepared()
        return batches(Batch(pair, 32.0, 4, 32), self.marks)

    def validation(self) -> dict[str, list[Batch]]:
        return {}


@plugin
class Noop:
    """The data and the model of the measurements."""

    marks: Any = None

    @hookimpl
    def build_data(self) -> Repeated:
        return Repeated(self.marks or {})

    @hookimpl
    def build_model(self) -> Model:
        return Model()


def by_run(marks: Marks, more: Mapping[str, Any] | None = None) -> Run:
    """Train with fundamentallm; ``more`` are settings in place of those above."""
    with quiet() as folder:
        return train({**SETTINGS, **(more or {})}, plugins=[Noop(marks=marks)], run_dir=folder)


def by_hand(marks: Marks) -> tuple[Model, list[dict[str, float]]]:
    """Train with the handwritten loop; return the model and the rows of metrics."""
    model = Model()
    with quiet() as folder:
        return model, handwritten.train(model, batches(prepared(), marks), STEPS, folder)


def fully_by_run(marks: Marks) -> Run:
    """Train with fundamentallm and everything that a careful user lists."""
    return by_run(marks, FULLY)


def fully_by_hand(marks: Marks) -> list[dict[str, float]]:
    """Train with the handwritten loop that has all of that."""
    with quiet() as folder:
        return handwritten.train_fully(Model(), batches(prepared(), marks), STEPS, folder)


LOOPS: dict[str, Callable[[Marks], object]] = {
    "run": by_run,
    "handwritten": by_hand,
    "fully_run": fully_by_run,
    "fully_handwritten": fully_by_hand,
}


@contextlib.contextmanager
def quiet() -> Iterator[Path]:
    """Provide a folder for a while, and keep what is printed meanwhile from the terminal."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        yield Path(folder)
