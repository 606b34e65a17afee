"""How long a step waits for its checkpoint: against a plain save that is waited for.

``python tests/benchmarks/checkpoint_stall.py`` trains a model of 50 million parameters with AdamW
(600 MB of state in single precision) and saves now and then, asynchronously. It prints how long the
steps waited at their safe points, how long ``safetensors`` takes to write the same tensors and sync
them, and the ratio, which is to be at most 0.10; and how much memory the copies take. Exit code 1
if one is more.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from fundamentallm import Period, field, ge, hookimpl, plugin, train
from fundamentallm.testing import TinyData, TinyOptimizer, compose_tiny
from fundamentallm_checkpoint import Checkpoint

if TYPE_CHECKING:
    from fundamentallm import Run

BOUND, MEMORY_BOUND = 0.10, 1.10  # stacks, buffers and the like take some MB besides
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
                return loss + 0.0 * sum(layer.weight.sum() + layer.bias.sum() for layer in self.deep)

        return Model()


@plugin
class Watch:
    """Times the safe points of the steps that save, and writes the same tensors plainly."""

    waits: list[float] = field(init=False, factory=list)
    plain: list[float] = field(init=False, factory=list)
    memory: list[int] = field(init=False, factory=list)
    state: int = field(init=False, default=0)

    def watched(self, run: Run) -> None:
        """Put a clock around what the saver does at a safe point."""
        saves = run.hook.on_safe_point

        def timed(*, run: Run) -> object:
            before = time.perf_counter()
            answer = saves(run=run)
            if run.progress.step % 2 == 0 and not run.ending:
                self.waits.append(time.perf_counter() - before)
            self.memory.append(_resident())
            _settle()  # so that nothing waits for what was begun before
            return answer

        run.hook.on_safe_point = timed  # type: ignore[method-assign]

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self.watched(run)

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        if run.progress.step % 2:
            tensors = dict(run.model.state_dict())
            for number, state in enumerate(run.optimizer.state.values()):
                tensors |= {f"{key}/{number}": value for key, value in state.items()}
            self.state = sum(tensor.nbytes for tensor in tensors.values())
            self.plain.append(_saved(tensors, run.folder / "plain.safetensors"))
            import fundamentallm_checkpoint.saving  # noqa: F401 - not to be counted as a copy's

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
        if thread is not threading.current_thread() and thread.name.startswith("checkpoint"):
            thread.join()
    os.sync()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> int:
    """Train, print, and tell whether the bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--layers", type=int, default=48, help="a million parameters each")
    parser.add_argument("--folder", type=Path, help="where to write; a disk, not a tmpfs")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix="stall-", dir=chosen.folder))
    watch = Watch()
    try:
        composed = compose_tiny(
            TinyData(), Deep(layers=chosen.layers), TinyOptimizer(), watch,
            Checkpoint(every=Period(2), keep_last=2, save_final=False),
            length=2 * chosen.saves + 1, log_every=10**6, device=chosen.device,
        )  # fmt: skip
        train(composed, run_dir=folder / "run")
    finally:
        shutil.rmtree(folder)
    return report(watch)


def report(watch: Watch) -> int:
    """Print what was measured; 1 if a bound is broken."""
    plain, waits = statistics.median(watch.plain), statistics.median(watch.waits)
    within = waits <= BOUND * plain
    print(f"{watch.state / 1e6:.0f} MB of state, {torch.get_num_threads()} thread(s), "
          f"{os.cpu_count()} cores")  # fmt: skip
    print(f"a plain save, synced: {plain:.3f} s (median of {len(watch.plain)}, "
          f"{min(watch.plain):.3f} to {max(watch.plain):.3f})")  # fmt: skip
    print(f"a step that saves waits: {waits:.4f} s (median of {len(watch.waits)}, "
          f"{min(watch.waits):.4f} to {max(watch.waits):.4f}; the first {watch.waits[0]:.4f})")
    print(f"ratio {waits / plain:.4f} (at most {BOUND}): {'PASS' if within else 'FAIL'}")
    more = (max(watch.memory) - watch.memory[0]) / watch.state
    fits = more <= MEMORY_BOUND
    print(f"memory besides: {more:.3f} times what is saved (at most {MEMORY_BOUND}): "
          f"{'PASS' if fits else 'FAIL'}")  # fmt: skip
    return 0 if within and fits else 1


if __name__ == "__main__":
    sys.exit(main())
