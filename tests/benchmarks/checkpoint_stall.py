"""How long a step waits for its checkpoint: against a plain save that is waited for.

``python tests/benchmarks/checkpoint_stall.py`` trains a model of 50 million parameters with AdamW
(600 MB of state in single precision). In turns, one step writes all of it plainly, with
``safetensors``' own ``save_file`` and an fsync, and the next is saved asynchronously by the
checkpoint plugin. So what else the machine and its disk do meets both, and the ratio of the two
waits is taken pair by pair. Its median is to be at most 0.10; and what the copies take in memory at
most once what is saved. Exit code 1 if one is more.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import math
import os
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from fundamentallm import Period, field, ge, hookimpl, plugin, train
from fundamentallm.testing import TinyData, TinyOptimizer, compose_tiny
from fundamentallm_checkpoint import Checkpoint

if TYPE_CHECKING:
    from fundamentallm import Run

BOUND, MEMORY_BOUND = 0.10, 1.10  # stacks, buffers and the like take some more MB
WIDTH = 1024


@plugin
class Deep:
    """Square layers, of which a step uses the first alone: training is to cost next to nothing."""

    layers: int = field(default=48, validator=ge(1))

    @hookimpl
    def build_model(self) -> torch.nn.Module:
        layers = self.layers

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = torch.nn.Linear(8, 1)
                self.deep = torch.nn.ModuleList(
                    torch.nn.Linear(WIDTH, WIDTH) for _ in range(layers)
                )

            def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
                loss = torch.nn.functional.mse_loss(self.first(inputs), targets)
                return loss + 0.0 * sum(
                    layer.weight.sum() + layer.bias.sum() for layer in self.deep
                )

        return Model()


@plugin
class Watch:
    """Times the safe points of the steps that save, and writes the same tensors plainly."""

    waits: list[float] = field(init=False, factory=list)
    plain: list[float] = field(init=False, factory=list)
    ready: float = field(init=False, default=0.0)
    memory: list[int] = field(init=False, factory=list)
    state: int = field(init=False, default=0)
    timed: Any = field(init=False, default=None)

    def watched(self, run: Run) -> None:
        """Put a clock around what the saver does at a safe point."""
        # At every step: the core replaces the caller of a hook after its first call.
        saves = run.hook.on_safe_point
        if saves is self.timed:
            return

        def timed(*, run: Run) -> object:
            before = time.perf_counter()
            answer = saves(run=run)
            waited = time.perf_counter() - before
            self.memory.append(_resident())
            _settle()  # so that nothing waits for what was begun before
            if run.progress.step == 1:  # when the memory for the copies is made
                self.ready = time.perf_counter() - before
            elif run.progress.step % 2 == 0 and not run.ending:
                self.waits.append(waited)
            os.sync()
            return answer

        self.timed = timed
        run.hook.on_safe_point = timed  # type: ignore[method-assign]

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        self.watched(run)
        if run.progress.step % 2:
            tensors = dict(run.model.state_dict())
            for number, state in enumerate(run.optimizer.state.values()):
                tensors |= {f"{key}/{number}": value for key, value in state.items()}
            self.state = sum(tensor.nbytes for tensor in tensors.values())
            self.plain.append(_saved(tensors, run.folder / "plain.safetensors"))
            import fundamentallm_checkpoint.save  # noqa: F401 - not to be counted as a copy's

            if not self.memory:  # before there is any copy
                self.memory.append(_resident())


def _saved(tensors: dict[str, torch.Tensor], path: Path) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    before = time.perf_counter()
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    taken = time.perf_counter() - before
    path.unlink()
    return taken


def _settle() -> None:
    for thread in threading.enumerate():
        if thread.name in ("checkpoint", "checkpoint-memory"):
            thread.join()


def _resident() -> int:
    with contextlib.suppress(AttributeError):  # of a C library without: it keeps what was freed
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> int:
    """Train, print, and tell whether the bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--saves", type=int, default=31, help="how many of each kind")
    parser.add_argument("--layers", type=int, default=48, help="a million parameters each")
    parser.add_argument("--folder", type=Path, help="where to write; a disk, not a tmpfs")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    # What is temporary is often kept in memory; this is on a disk.
    where = chosen.folder or next(path for path in (Path("/var/tmp"), Path.cwd()) if path.is_dir())
    folder = Path(tempfile.mkdtemp(prefix="stall-", dir=where))
    watch = Watch()
    try:
        composed = compose_tiny(
            TinyData(),
            Deep(layers=chosen.layers),
            TinyOptimizer(),
            watch,
            Checkpoint(every=Period(2), keep_last=2, save_final=False),
            length=2 * chosen.saves + 1,
            log_every=10**6,
            device=chosen.device,
        )
        train(composed, run_dir=folder / "run")
    finally:
        shutil.rmtree(folder)
    return report(watch)


def report(watch: Watch) -> int:
    """Print what was measured; 1 if a bound is broken."""
    pairs = list(zip(watch.waits, watch.plain, strict=False))  # the last step's has no other
    ratios = sorted(waited / plain for waited, plain in pairs)
    # The order statistics between which the true median is in 19 of 20 measurements.
    away = min(round(0.98 * math.sqrt(len(ratios))), (len(ratios) - 1) // 2)
    low, high = ratios[(len(ratios) - 1) // 2 - away], ratios[len(ratios) // 2 + away]
    ratio = statistics.median(ratios)
    print(
        f"{watch.state / 1e6:.0f} MB of state, {torch.get_num_threads()} thread(s), "
        f"{os.cpu_count()} cores, {len(pairs)} pairs of saves"
    )
    print(f"a plain save, synced: {_spread([plain for _, plain in pairs])}")
    print(
        f"a step that saves waits: {_spread(watch.waits)}; the first time {watch.waits[0]:.3f} s, "
        f"its memory was prepared parallel to the steps in {watch.ready:.3f} s"
    )
    print(
        f"wait for a checkpoint: median ratio of {len(pairs)} pairs {ratio:.4f} (95%: {low:.4f} to "
        f"{high:.4f}; all: {ratios[0]:.4f} to {ratios[-1]:.4f}), at most {BOUND}: "
        f"{'PASS' if ratio <= BOUND else 'FAIL'}"
    )
    more = (max(watch.memory) - watch.memory[0]) / watch.state
    print(
        f"memory for a checkpoint: {more:.3f} times what is saved (at most {MEMORY_BOUND}): "
        f"{'PASS' if more <= MEMORY_BOUND else 'FAIL'}"
    )
    return 0 if ratio <= BOUND and more <= MEMORY_BOUND else 1


def _spread(seconds: list[float]) -> str:
    return f"median {statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"


if __name__ == "__main__":
    sys.exit(main())
