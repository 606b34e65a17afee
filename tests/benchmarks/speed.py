"""Steps per second of a small GPT, trained by fundamentallm and by hand in turns of ten steps.

Both trainings live in one process and take turns at the processor, so that what else the machine
does slows both alike. Every fifth turn has a log row, in either loop.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
import sysconfig
import threading
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import handwritten
import noop
import numpy as np
import torch

from fundamentallm import Run, hookimpl, plugin, train

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

TURN = 10
WARM = 2
BOUND = 0.99
LENGTH, BATCH = 64, 12
CHARACTERS = 1_000_000
SETTINGS: dict[str, Any] = {
    **noop.SETTINGS,
    "plugins": ["text", "gpt", *noop.SETTINGS["plugins"]],
    "text": {"tokenizer": "char", "context_length": LENGTH, "batch_size": BATCH},
    "gpt": {"num_layers": 4, "num_heads": 4, "d_model": 128},
}


class Cost(NamedTuple):
    """Seconds on the clock, and of the process on any processor."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> Cost:
        return cls(time.perf_counter(), time.process_time())

    def since(self) -> Cost:
        now = self.now()
        return Cost(now.wall - self.wall, now.processor - self.processor)


@plugin
class Turns:
    """Trains by hand whenever the run has trained for a turn; ``pairs`` are the costs of both."""

    corpus: Any = None
    pairs: Any = None

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        tokens = self.corpus.with_suffix(".bin")
        write_tokens(run, self.corpus, tokens)
        folder = run.folder / "rival"
        self.rival = Rival(copy.deepcopy(run.model), batches(tokens), run, folder)
        self.began = Cost.now()

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if run.progress.step % TURN == 0:
            by_run = self.began.since()
            self.pairs.append((by_run, self.rival.train_a_turn()))
            self.began = Cost.now()


class Rival:
    """The handwritten loop in a thread of its own, which trains only while it has the turn."""

    def __init__(self, model: nn.Module, batches: Iterator[Any], run: Run, folder: Path) -> None:
        self.mine, self.its = threading.Semaphore(0), threading.Semaphore(0)
        folder.mkdir()
        # A step more than it ever makes: what ends a training is not to be measured.
        steps = int(run.settings.length.amount) + 1
        arguments = (model, self.in_turns(batches), steps, folder)
        # Daemon: if the run fails, the thread would wait for its turn for ever.
        threading.Thread(target=handwritten.train, args=arguments, daemon=True).start()

    def train_a_turn(self) -> Cost:
        """Train by hand for as many steps, and return what that took."""
        began = Cost.now()
        self.mine.release()
        self.its.acquire()
        return began.since()

    def in_turns(self, batches: Iterator[Any]) -> Iterator[Any]:
        self.mine.acquire()
        for step in itertools.count(1):
            yield next(batches)
            if step % TURN == 0:
                self.its.release()
                self.mine.acquire()


def write_tokens(run: Run, corpus: Path, tokens: Path) -> None:
    """Write the tokens of the corpus to a file."""
    assert run.tokenizer is not None
    numbers = run.tokenizer.encode(corpus.read_text())
    np.array(numbers, dtype=np.uint16).tofile(tokens)


def batches(path: Path, rows: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random windows of a file of tokens, as inputs and targets of shape (rows, T)."""
    tokens = np.memmap(path, dtype=np.uint16, mode="r")
    while True:
        starts = torch.randint(len(tokens) - LENGTH, (rows,)).tolist()
        windows = np.stack([tokens[i : i + LENGTH + 1] for i in starts]).astype(np.int64)
        both = torch.from_numpy(windows)
        yield both[:, :-1].contiguous(), both[:, 1:].contiguous()


def measure(pairs: int) -> list[tuple[Cost, Cost]]:
    """Return what ``pairs`` turns took, each by the run and by hand."""
    found: list[tuple[Cost, Cost]] = []
    with noop.quiet() as folder:
        corpus = folder / "corpus.txt"
        corpus.write_text(standard_library())
        settings = copy.deepcopy(SETTINGS)
        settings["text"] |= {"path": str(corpus), "cache_dir": str(folder / "cache")}
        settings["run"]["length"] = (pairs + WARM) * TURN
        train(settings, plugins=[Turns(corpus=corpus, pairs=found)], run_dir=folder / "run")
    return found[WARM:]


def standard_library() -> str:
    """Return the beginning of the sources of Python's standard library."""
    text = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= CHARACTERS:
            break
    return text[:CHARACTERS]


def report(pairs: int) -> bool:
    """Measure, print what was found, and tell whether it is enough."""
    found = measure(pairs)
    for side, name in enumerate(Cost._fields):
        by_run, by_hand = (TURN / median(pair[k][side] for pair in found) for k in (0, 1))
        ratios = sorted(pair[1][side] / pair[0][side] for pair in found)
        # The order statistics between which the true median is in 19 of 20 measurements.
        away = min(round(0.98 * math.sqrt(pairs)), (pairs - 1) // 2)
        low, high = ratios[(pairs - 1) // 2 - away], ratios[pairs // 2 + away]
        print(
            f"steps per second of a GPT, by {name} time: run {by_run:.2f}, "
            f"handwritten {by_hand:.2f}; median ratio of {pairs} pairs {median(ratios):.4f} "
            f"(95%: {low:.4f} to {high:.4f})"
        )
    ratio = median(by_hand.wall / by_run.wall for by_run, by_hand in found)
    print(
        f"steps per second of a GPT, by wall time: ratio {ratio:.4f} (at least {BOUND}): "
        f"{'PASS' if ratio >= BOUND else 'FAIL'}"
    )
    return ratio >= BOUND


if __name__ == "__main__":
    sys.exit(not report(int(sys.argv[1])))
