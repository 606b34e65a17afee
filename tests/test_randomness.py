"""The random numbers of a step depend on nothing that was drawn before it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import forked
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fundamentallm import Rejection, Run, field, hookimpl, plugin
from fundamentallm.testing import TinySamples, assert_same_weights

LENGTH = 6
DRAWS = {
    "torch": lambda: torch.rand(3),
    "python": random.random,
    "numpy": lambda: np.random.rand(3),  # noqa: NPY002
    "seed": lambda: torch.manual_seed(0),
}
MOMENTS = ("on_step_start", "source", "settle_step", "on_step_end", "validation", "on_safe_point")
# What is drawn from, when, in which step.
plans = st.lists(
    st.tuples(st.sampled_from(MOMENTS), st.integers(0, LENGTH), st.sampled_from(sorted(DRAWS))),
    max_size=12,
)


@plugin
class Noisy:
    """Adds noise of every generator to the gradients, so that each of them shows in the weights."""

    @hookimpl
    def edit_gradients(self, run: Run) -> None:
        for parameter in run.parameters:
            noise = torch.rand(()) + random.random() + float(np.random.rand())  # noqa: NPY002
            parameter.grad += 0.01 * noise


class RestlessSamples(TinySamples):
    def __init__(self, draw: Any, device: str) -> None:
        super().__init__(4, device)
        self.draw = draw

    def batches(self, progress: Any) -> Any:
        self.draw("source")
        for batch in super().batches(progress):
            self.draw("source")
            yield batch
            self.draw("source")


@plugin
class Restless:
    """Draws from the global generators where the plan says so; keeps and restores snapshots."""

    plan: list[Any]
    kept: dict[int, Any] = field(factory=dict)
    resume: int = 0
    now: Any = field(init=False, default=None)

    def draw(self, moment: str) -> None:
        for planned, step, generator in self.plan:
            if (planned, step) == (moment, self.now.progress.step):
                DRAWS[generator]()

    @hookimpl
    def build_data(self, run: Run) -> RestlessSamples:
        self.now = run
        return RestlessSamples(self.draw, run.device)

    @hookimpl
    def read_checkpoint(self) -> Any:
        return self.kept.get(self.resume)

    @hookimpl
    def on_step_start(self) -> None:
        self.draw("on_step_start")

    @hookimpl
    def settle_step(self) -> None:
        self.draw("settle_step")

    @hookimpl
    def on_step_end(self) -> None:
        self.draw("on_step_end")

    @hookimpl
    def on_validation_end(self) -> None:
        self.draw("validation")

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        self.draw("on_safe_point")
        if not self.resume:
            self.kept[run.progress.step] = deepcopy(run.snapshot())


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(plans, plans, st.integers(1, LENGTH - 1))
def test_draws_at_any_moment_change_no_later_step_nor_a_resumed_run(
    tiny_run, tmp_path_factory, plan, other_plan, step
):
    def run(restless: Restless) -> Run:
        folder = tmp_path_factory.mktemp("run")
        return tiny_run(restless, Noisy(), length=LENGTH, validate_every=2, run_dir=folder)

    kept: dict[int, Any] = {}
    quiet = run(Restless(plan=[]))
    drawing = run(Restless(plan=plan, kept=kept))
    resumed = run(Restless(plan=other_plan, kept=kept, resume=step))
    assert_same_weights(quiet, drawing)
    assert_same_weights(quiet, resumed)
    assert quiet.history == drawing.history


def test_a_rejected_step_leaves_the_random_numbers_of_the_update_after_it(tiny_run, tmp_path):
    numbers: dict[bool, list[float]] = {}

    @plugin
    class Rejects:
        really: bool

        @hookimpl
        def judge_step(self, run):
            drawn = float(torch.rand(()))
            if self.really and run.progress.step in (2, 3):
                return Rejection("other", "for the test")
            numbers.setdefault(self.really, []).append(drawn)
            return None

    tiny_run(Rejects(really=False), length=6, run_dir=tmp_path / "a")
    tiny_run(Rejects(really=True), length=8, run_dir=tmp_path / "b")
    assert numbers[True] == numbers[False]
    assert len(set(numbers[True])) == 6


def test_every_part_of_the_data_and_every_seed_draws_other_numbers(tiny_run, tmp_path):
    @plugin
    class Ranked:
        part: int
        drawn: float = 0.0

        @hookimpl
        def on_train_start(self, run):  # the data is built, and the same for all
            run.data_rank = self.part

        @hookimpl
        def forward(self, run, batch):
            if run.phase == "train":
                self.drawn = float(torch.rand(()))
            return run.module(*batch.data)

    found = set()
    for part, seed in ((0, 1), (1, 1), (0, 2)):
        ranked = Ranked(part=part)
        tiny_run(ranked, length=1, seed=seed, run_dir=tmp_path / f"{part}-{seed}")
        found.add(ranked.drawn)
    assert len(found) == 3


PARTS = '''
"""A data source with loader workers that draws at random, and a model with dropout."""

import os
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fundamentallm import Batch, hookimpl, plugin


class Samples(Dataset):
    def __init__(self, first):
        self.first = first

    def __len__(self):
        return 24 - self.first % 24

    def __getitem__(self, index):
        x = torch.sin((self.first + index) % 24 * torch.arange(1.0, 9.0))
        return x, x.sum(0, keepdim=True).tanh()


def draw():
    """Draw from the global generators as often as chance, not the seed, will have it."""
    for chance in os.urandom(2):
        (torch.rand, np.random.rand, lambda _: random.random())[chance % 3](chance % 7)


class Source:
    epoch_samples, fingerprint = 24, "restless"

    def __init__(self, workers):
        self.workers = workers

    def batches(self, progress):
        first = progress.samples
        while True:
            draw()
            # The loader draws a base seed at every epoch, and in the resumed run once more.
            for pair in DataLoader(Samples(first), batch_size=4, num_workers=self.workers):
                draw()
                yield Batch(tuple(pair), len(pair[0]), len(pair[0]), len(pair[0]), first=first)
                first += len(pair[0])

    def validation(self):
        return {"val": [Batch(tuple(t[None] for t in Samples(0)[0]), 1, 1, 1)]}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x, y):
        noise = random.random() + np.random.rand() if self.training else 0.0
        hidden = nn.functional.dropout(self.hidden(x), 0.3, self.training)
        return nn.functional.mse_loss(self.out(hidden) + 0.1 * noise, y)


@plugin
class Parts:
    workers: int = 0

    @hookimpl
    def build_data(self):
        return Source(self.workers)

    @hookimpl
    def build_model(self):
        return Net()

    @hookimpl
    def on_safe_point(self):
        draw()
'''
SETTINGS = """
plugins = ["./parts.py", "adamw", "checkpoint", "jsonl"]

[run]
length = 40
log_every = 7
validate_every = 10
device = "cpu"

[checkpoint]
every = 3
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("workers", [0, 2, pytest.param(4, marks=pytest.mark.slow)])
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(kills=st.tuples(st.integers(3, 14), st.integers(18, 32)))
def test_a_run_whose_source_draws_at_random_ends_with_the_same_bits_after_kill_9(
    workers, tmp_path, kills
):
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "run.toml").write_text(f"{SETTINGS}\n[parts]\nworkers = {workers}\n")
    whole, killed = tmp_path / "whole", Path(mkdtemp(dir=tmp_path)) / "killed"
    if not whole.exists():  # it is the same for all examples
        done = forked.run(start(tmp_path, whole), **options(), timeout=240)
        assert done.returncode == 0, done.stderr
    words = start(tmp_path, killed)
    for step in kills:
        process = forked.Popen(words, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        wait_for_step(killed, process, step)
        process.send_signal(signal.SIGKILL)
        process.wait()
        words = [sys.executable, "-m", "fundamentallm", "resume", str(killed)]
    done = forked.run(words, **options(), timeout=240)
    assert done.returncode == 0, done.stderr
    assert final(killed) == final(whole)
    assert rows(killed) == rows(whole)


def start(folder: Path, run: Path) -> list[str]:
    words = [sys.executable, "-m", "fundamentallm", "train", str(folder / "run.toml")]
    return [*words, "--run-dir", str(run)]


def options() -> dict[str, Any]:
    return {"env": ENVIRONMENT, "capture_output": True, "text": True}


def wait_for_step(folder: Path, process: forked.Popen, step: int) -> None:
    while process.poll() is None:
        if any(int(path.name[5:]) >= step for path in folder.glob("checkpoints/step-*")):
            return
        time.sleep(0.005)


def final(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "checkpoints" / "step-00000040" / "model.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in found]
