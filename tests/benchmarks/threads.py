"""Measure the training time with busy processes, for each way in which torch's threads may wait.

``python tests/benchmarks/threads.py`` trains two models in processes of their own: that of
``settings/tiny.toml`` and that of ``settings/quickstart.toml``, each on idle cores, with one busy
process for every core but one, with one for every core, and with one that comes and goes. For each
it prints the median seconds of training with each choice. ``--repeats N`` trains so often (3),
``--choices`` and ``--loads`` name some of them. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
CORES = len(os.sched_getaffinity(0))
LOADS = {"quiet": 0, "one core free": CORES - 1, "no core free": CORES, "comes and goes": -1}
CHOICES: dict[str, dict[str, str]] = {
    "as shipped": {},
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "GOMP_SPINCOUNT=20000": {"GOMP_SPINCOUNT": "20000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
MODELS = {"tiny": 100, "quickstart": 80}
LEFT_OUT = ("mlflow", "sample", "progress", "checkpoint")
AWAY = 3.0  # seconds that the process that comes and goes is there, and away


def busy() -> subprocess.Popen[bytes]:
    """Start a process that uses one core."""
    return subprocess.Popen([sys.executable, "-c", "while True: pass"])


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """Run so many busy processes; -1: one that comes and goes."""
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            with load(1):
                over.wait(AWAY)
            over.wait(AWAY)

    started = [busy() for _ in range(processes)]
    coming = threading.Thread(target=come_and_go)
    if processes < 0:
        coming.start()
    try:
        yield
    finally:
        over.set()
        if processes < 0:
            coming.join()
        for one in started:
            one.kill()
            one.wait()


def seconds(model: str, choice: dict[str, str], folder: Path) -> float:
    """Train a model and return the seconds of training that its log states."""
    settings = ROOT / "settings" / f"{model}.toml"
    words = ["train", str(settings), "--run-dir", str(folder), "--plugin", "console"]
    words += ["--set", f"run.length={MODELS[model]}", "--set", 'run.validate_every="1e9 steps"']
    listed = re.findall(
        r'"(\w+)"', settings.read_text() + (ROOT / "settings/base.toml").read_text()
    )
    words += [w for name in LEFT_OUT if name in listed for w in ("--no-plugin", name)]
    if "console" in listed:
        words = [word for word in words if word not in ("--plugin", "console")]
    known = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    command = [sys.executable, "-m", "fundamentallm", *words]
    done = subprocess.run(command, env=known | choice, capture_output=True, text=True, check=False)
    found = re.search(r"after ([\d.]+) s of training", done.stderr)
    if found is None:
        raise SystemExit(done.stderr)
    return float(found[1])


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=list(CHOICES))
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    chosen = parser.parse_args()
    for model, length in MODELS.items():
        print(f"\n{model}, {length} steps, {CORES} cores: median seconds of {chosen.repeats}")
        print(f"{'':26}" + "".join(f"{name:>16}" for name in chosen.loads))
        for name in chosen.choices:
            row = []
            for at in chosen.loads:
                with tempfile.TemporaryDirectory() as folder, load(LOADS[at]):
                    times = [
                        seconds(model, CHOICES[name], Path(folder) / str(n))
                        for n in range(chosen.repeats)
                    ]
                row.append(median(times))
            print(f"{name:26}" + "".join(f"{value:16.1f}" for value in row), flush=True)


if __name__ == "__main__":
    main()
