"""A tiny GPT to break: how it is started as a process of its own, killed, resumed and compared.

Everything that a resumed run may forget is on: dropout, shuffled epochs, accumulation, averaged
weights, a schedule, and early stopping, which is what ends the run: a forgotten count moves the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import forked
import tomli_w
from safetensors.numpy import load_file

from fundamentallm_checkpoint.storage import directory, manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import ForkServerProcess

EVERY = 4
"""Steps between two saves."""
LAST = 30
"""The step that early stopping ends at."""

WORDS = 100
"""Words of the corpus: so few that a run passes the ends of several epochs."""

SAVES = (*range(EVERY, LAST, EVERY), LAST)
"""The steps that are saved."""

TABLES: dict[str, Any] = {
    "plugins": [
        "text",
        "gpt",
        "adamw",
        "accumulate",
        "early_stopping",
        "ema",
        "lr_schedule",
        "jsonl",
        "checkpoint",
    ],
    "run": {"length": "100 steps", "validate_every": 6, "log_every": 1, "device": "cpu"},
    "text": {
        "path": "corpus.txt",
        "tokenizer": "char",
        "context_length": 8,
        "batch_size": 2,
        "sampling": "epochs",
        "validation_batches": 2,
        "cache_dir": "cache",
    },
    "gpt": {"num_layers": 1, "num_heads": 2, "d_model": 16, "dropout": 0.2},
    "accumulate": {"microbatches": 2},
    "early_stopping": {"patience": 4, "min_delta": 100.0},
    "ema": {"decay": 0.9},
    "lr_schedule": {"warmup": "5 steps"},
    "checkpoint": {"every": EVERY, "keep_last": 3},
}


def write_settings(folder: Path, **tables: dict[str, Any]) -> Path:
    """Write the corpus and the settings into a folder; ``tables`` change or add to them."""
    letters = random.Random(7)
    words = ["".join(letters.choices("abcdefgh", k=letters.randint(1, 7))) for _ in range(WORDS)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text(" ".join(words))
    listed = TABLES["plugins"] + [name for name in tables if name not in TABLES]
    merged = {
        name: {**TABLES.get(name, {}), **tables.get(name, {})}
        for name in {**TABLES, **tables}
        if name != "plugins"
    }
    path = folder / "settings.toml"
    path.write_text(tomli_w.dumps({"plugins": listed, **merged}))
    return path


@attrs.frozen
class Started:
    """A command of ``fundamentallm`` in a process of its own."""

    process: ForkServerProcess
    log: Path

    def send(self, number: int) -> None:
        """Send a signal, if the process is still there."""
        if self.process.is_alive():
            os.kill(self.process.pid or 0, number)

    def wait(self) -> int:
        """Wait for the end and return the exit code: negative if a signal killed it."""
        self.process.join(120)
        assert self.process.exitcode is not None, self.said
        return self.process.exitcode

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    @property
    def said(self) -> str:
        """What it wrote to stdout and stderr."""
        return self.log.read_text()

    @property
    def peak(self) -> int:
        """The most memory it held, in MB; known only of one that was not killed."""
        return int(self.log.with_suffix(".peak").read_text())


def start(*words: Path | str, before: Callable[[], None] | None = None) -> Started:
    """Start ``fundamentallm`` with these words; ``before`` is called in its process first."""
    place = next(Path(word) for word in reversed(words) if Path(word).is_absolute())
    log = place.with_name(f"{place.name}.{time.monotonic_ns()}.log")
    said = [str(word) for word in words]
    process = forked.context.Process(target=command, args=(said, log, before))
    process.start()
    return Started(process, log)


def command(words: list[str], log: Path, before: Callable[[], None] | None) -> None:
    """Do what the command does, with its output in a file."""
    import torch

    from fundamentallm import cli

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    if before is not None:
        before()
    sys.argv = ["fundamentallm", *words]
    try:
        cli.main()
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        log.with_suffix(".peak").write_text(str(peak))


def resume(folder: Path, *words: str) -> Started:
    return start("resume", folder, *words)


def end(started: Started, code: int = 0) -> str:
    """Wait for a process, demand its exit code, and return what it said."""
    found = started.wait()
    assert found == code, f"exit code {found}\n{started.said}"
    return started.said


def steps(folder: Path) -> list[int]:
    """Return the steps that a run has checkpoints of, in order."""
    return sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step-*"))


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def digest(folder: Path) -> str:
    """Return a hash of all weights, moments and averages of a run's last checkpoint, by name."""
    assert steps(folder)[-1:] == [LAST], f"{folder} did not end where it should"
    found = hashlib.sha256()
    for path in sorted(checkpoint(folder, LAST).glob("*.safetensors")):
        for name, array in sorted(load_file(path).items()):
            found.update(f"{path.name} {name} {array.dtype} {array.shape}".encode())
            found.update(array.tobytes())
    return found.hexdigest()


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics without the time of day."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def reached(folder: Path) -> int:
    """Return the last step whose row is whole."""
    path = folder / "metrics.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    return int(json.loads(whole[-1])["step"]) if whole else 0


def unsound(folder: Path) -> list[str]:
    """Return what is wrong with a run's checkpoints, every byte of them being read."""
    problems = []
    for path in directory.folders(folder / "checkpoints"):
        try:
            manifest.verify(path, manifest.read(path))
        except manifest.UnsoundError as error:
            problems.append(f"{path.name}: {error}")
    return problems


def wait_for(ready: Callable[[], object], started: Started) -> bool:
    """Wait until something holds; False if the process ended before."""
    while not ready():
        if not started.alive:
            return False
        time.sleep(0.0005)
    return True


SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}
