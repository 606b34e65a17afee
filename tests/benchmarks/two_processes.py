"""Steps per second of a small GPT in two processes: by fundamentallm with ``ddp``, and by hand.

``python tests/benchmarks/two_processes.py`` trains both in turns of ten steps, as ``speed.py`` does
for one process. By hand means DistributedDataParallel around the model of ``handwritten.py``: no
process asks another one how it is, and only the first writes. The run's processes agree on stopping
once a step. Both use gloo on the CPU.
"""

from __future__ import annotations

import copy
import sys
from statistics import median
from typing import TYPE_CHECKING, Any

import noop
import speed
from torch.nn.parallel import DistributedDataParallel

from fundamentallm import Run, hookimpl, plugin, train
from fundamentallm.testing import in_processes

if TYPE_CHECKING:
    from pathlib import Path

PAIRS, BOUND = 60, 1.02
PATIENCE = 600.0  # seconds


@plugin
class TurnsOfAll(speed.Turns):
    """Trains by hand whenever the run has trained for a turn, in every process."""

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        tokens = self.corpus.with_suffix(f".{run.rank}.bin")
        speed.write_tokens(run, self.corpus, tokens)
        by_hand = DistributedDataParallel(copy.deepcopy(run.model), gradient_as_bucket_view=True)
        rows = speed.BATCH // run.world_size
        folder = run.folder / f"rival-{run.rank}"
        self.rival = speed.Rival(by_hand, speed.batches(tokens, rows), run, folder)
        self.began = speed.Cost.now()


def measure(pairs: int) -> list[tuple[speed.Cost, speed.Cost]]:
    """Return what ``pairs`` turns took the first of two processes, each by the run and by hand."""
    with noop.quiet() as folder:
        (folder / "corpus.txt").write_text(speed.standard_library())

        def work(_: int) -> list[Any]:
            return trained(folder, pairs)

        return in_processes(2, work, patience=PATIENCE)[0][speed.WARM :]


def trained(folder: Path, pairs: int) -> list[Any]:
    """Train in this process as one of several; return the costs of all turns."""
    found: list[Any] = []
    settings = copy.deepcopy(speed.SETTINGS)
    settings["plugins"] = [*settings["plugins"], "ddp"]
    corpus = folder / "corpus.txt"
    settings["text"] |= {"path": str(corpus), "cache_dir": str(folder / "cache")}
    settings["run"]["length"] = (pairs + speed.WARM) * speed.TURN
    train(settings, plugins=[TurnsOfAll(corpus=corpus, pairs=found)], run_dir=folder / "run")
    return [tuple(map(tuple, pair)) for pair in found]


def main() -> int:
    """Print the ratio of step times, and whether it is within its bound."""
    found = measure(PAIRS)
    ratios = sorted(by_run[0] / by_hand[0] for by_run, by_hand in found)
    by_run, by_hand = (1000 * median(pair[k][0] for pair in found) / speed.TURN for k in (0, 1))
    print(
        f"milliseconds per step of a GPT in two processes: run {by_run:.2f}, handwritten "
        f"{by_hand:.2f}; median ratio of {PAIRS} pairs {median(ratios):.4f} (at most {BOUND}): "
        f"{'PASS' if median(ratios) <= BOUND else 'FAIL'}"
    )
    return 0 if median(ratios) <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main())
