"""Measure the cost of a step without the model: all figures, each with its bound, PASS or FAIL.

``python tests/benchmarks/run.py`` ends with exit code 1 if a bound is broken. ``--pairs N`` is how
long the two loops race (twenty steps each pair), ``--quick`` counts Python calls alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

import calls
import instructions
import logging_cost
import noop
import speed
import torch

BOUND = 1.05
# With all that a careful user lists; the calls are bound more loosely, since most are torch's own.
FULLY = {"Python calls": 1.17, "instructions": 1.1}
INTERVALS = {"period": "50 steps and their log row", "between": "steps between two log rows"}


def main() -> int:
    """Print all figures and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="count Python calls alone")
    parser.add_argument("--pairs", type=int, default=200, help="length of the races")
    chosen = parser.parse_args()
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} thread(s)"
    )
    within = []
    for prefix, plugins in (("", noop.SETTINGS["plugins"]), ("fully_", noop.FULLY["plugins"])):
        print(f"a run with {', '.join(plugins)}")
        within += [show_calls(prefix)]
        within += [] if chosen.quick else [show_instructions(prefix)]
    if not chosen.quick:
        within += [speed.report(chosen.pairs)]
        within += [logging_cost.report(max(8, chosen.pairs // 5))]  # as many steps
        sys.stdout.flush()
        # In processes of their own: the memory of one is measured, a server of the other stopped.
        for script in ("checkpoint_stall.py", "two_processes.py", "outage_hooks.py"):
            alone = [sys.executable, Path(__file__).with_name(script)]
            within += [subprocess.run(alone, check=False).returncode == 0]
    return 0 if all(within) else 1


def show_calls(prefix: str) -> bool:
    """Print the Python calls per step of both loops."""
    spans = {"period": noop.PERIOD, "between": noop.BETWEEN}
    counted = [
        {name: calls.per_step(noop.LOOPS[prefix + loop], span) for name, span in spans.items()}
        for loop in ("run", "handwritten")
    ]
    return show("Python calls", *counted, FULLY["Python calls"] if prefix else BOUND)


def show_instructions(prefix: str) -> bool:
    """Print the instructions per step of both loops, if they can be counted here."""
    if not instructions.available():
        print("instructions: not counted, valgrind is not installed")
        return True
    counted = [instructions.counts(prefix + loop) for loop in ("run", "handwritten")]
    return show("instructions", *counted, FULLY["instructions"] if prefix else BOUND)


def show(what: str, by_run: dict[str, float], by_hand: dict[str, float], bound: float) -> bool:
    """Print a figure of both loops; tell whether the run's is within its bound."""
    within = True
    for name, text in INTERVALS.items():
        ratio = by_run[name] / by_hand[name]
        within = within and ratio <= bound
        print(
            f"{what} per step, {text}: run {by_run[name]:,.1f}, "
            f"handwritten {by_hand[name]:,.1f}, ratio {ratio:.4f} (at most {bound}): "
            f"{'PASS' if ratio <= bound else 'FAIL'}",
            flush=True,
        )
    return within


if __name__ == "__main__":
    sys.exit(main())
