"""What ``mlflow`` and ``jsonl`` cost the training of a small GPT, in turns with and without them.

One run trains in turns. In every other one the hooks of the two plugins are left out and the
upload worker is stopped, so that nothing of them is left; it catches up in the turn
after. A turn is longer than the three seconds between two shipments, and has a log row every ten
steps. Which comes first changes from pair to pair, since a machine may grow faster or slower.
"""

from __future__ import annotations

import copy
import random
import signal
import sys
from statistics import median
from typing import TYPE_CHECKING, Any

import noop
import psutil
import speed
from speed import Cost

from fundamentallm import Run, hookimpl, plugin, train

if TYPE_CHECKING:
    from collections.abc import Callable

LOGGERS = ("mlflow", "jsonl")
TURN, EVERY = 50, 10
WARM = 1
BOUND = 1.01
DRAWS = 2000


@plugin
class Sides:
    """Changes, after every turn, between the run as it is and one without its loggers. ``pairs``
    are the costs of two turns, with and without; ``shipping`` are processor seconds of the child
    at the beginning and now."""

    pairs: Any = None
    shipping: Any = None

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        me = psutil.Process()
        (self.child,) = me.children()
        self.hooks = {True: run.hook, False: run.bind(silenced)}
        self.turns: dict[bool, Cost] = {}
        self.order = (
            sides for n in range(1 << 30) for sides in ((True, False), (False, True))[n % 2]
        )
        self.take_turn(run)

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if run.progress.step % TURN:
            return
        self.turns[self.side] = self.began.since()
        if len(self.turns) == 2:
            self.pairs.append((self.turns[True], self.turns[False]))
            self.turns = {}
            self.shipping.append(sum(self.child.cpu_times()[:2]))
        self.take_turn(run)

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        run.hook = self.hooks[True]
        self.child.send_signal(signal.SIGCONT)

    def take_turn(self, run: Run) -> None:
        self.side = next(self.order)
        run.hook = self.hooks[self.side]
        self.child.send_signal(signal.SIGCONT if self.side else signal.SIGSTOP)
        self.began = Cost.now()


def silenced(name: str, hook: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook implementation, or nothing to speak of if it is one of a logger."""
    return nothing if name in LOGGERS else call


def nothing(**_: Any) -> None:
    """Do nothing."""


def measure(pairs: int) -> tuple[list[tuple[Cost, Cost]], float]:
    """Return what pairs of turns took, with and without the loggers, and the processor seconds
    that the upload worker took for a thousand steps with them."""
    found: list[tuple[Cost, Cost]] = []
    shipping: list[float] = []
    with noop.quiet() as folder:
        corpus = folder / "corpus.txt"
        corpus.write_text(speed.standard_library())
        settings = copy.deepcopy(speed.SETTINGS)
        settings["plugins"] = [*settings["plugins"], "mlflow"]
        settings["text"] |= {"path": str(corpus), "cache_dir": str(folder / "cache")}
        settings["run"] |= {"length": 2 * (pairs + WARM) * TURN + 1, "log_every": EVERY}
        # What the end of the run takes is not measured, and the start may be slow.
        settings["mlflow"] = {
            "tracking_uri": f"sqlite:///{folder / 'mlflow.db'}",
            "plot": False,
            "start_seconds": 300.0,
            "end_seconds": 300.0,
        }
        sides = Sides(pairs=found, shipping=shipping)
        train(settings, plugins=[sides], run_dir=folder / "run")
    return found[WARM:], 1000 * (shipping[-1] - shipping[0]) / (pairs * TURN)


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return between what the median is in 95 of 100 drawings from the ratios, with repetition."""
    draw = random.Random(0)
    medians = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(DRAWS))
    return medians[DRAWS // 40], medians[-DRAWS // 40 - 1]


def report(pairs: int) -> bool:
    """Measure, print what was found, and tell whether it is enough."""
    found, shipping = measure(pairs)
    for side, name in enumerate(Cost._fields):
        ratios = [with_them[side] / without[side] for with_them, without in found]
        low, high = interval(ratios)
        print(
            f"a GPT's steps with {' and '.join(LOGGERS)} and without, by {name} time: median "
            f"ratio of {pairs} pairs {median(ratios):.4f} (95%: {low:.4f} to {high:.4f})"
        )
    print(
        f"the upload worker: {shipping:.2f} s of the processor in a thousand steps "
        f"of {1000 * median(without.wall for _, without in found) / TURN:.1f} ms"
    )
    ratios = [with_them.wall / without.wall for with_them, without in found]
    (low, high), ratio = interval(ratios), median(ratios)
    print(
        f"a GPT's steps with {' and '.join(LOGGERS)} and without, by wall time: ratio "
        f"{ratio:.4f} (at most {BOUND}): {'PASS' if ratio <= BOUND else 'FAIL'}"
    )
    if low <= BOUND < high:
        print(
            "  the machine is too busy to tell: the bound is within the interval; take more pairs"
        )
    return ratio <= BOUND


if __name__ == "__main__":
    sys.exit(not report(int(sys.argv[1])))
