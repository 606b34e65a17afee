"""Measure the run on a GPU against a handwritten loop, nanoGPT's way and the device's ceilings.

``python3 tests/gpu/bench.py --out FOLDER`` measures everything, each part in a process of its own,
and writes ``bench.json`` and ``bench.txt`` into FOLDER. ``--part loops`` measures one part alone;
it may be given several times.
Exit code 1 if a goal is missed or a part failed. ``--dry`` executes all of it with a tiny model on
the CPU. Without a GPU nothing else can be done, and the command says so.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # scripts, not a package

import torch
from device import Cpu, Cuda
from parts import PARTS, Bench
from sizes import GPT2, TINY

MODES = ("default", "max-autotune-no-cudagraphs")
START = 60  # seconds that a part needs at the least, to begin it


def main() -> int:
    """Measure, print, and return the exit code."""
    chosen = arguments()
    if not (chosen.dry or torch.cuda.is_available()):
        print(
            "no NVIDIA GPU here: nothing is measured. --dry executes all of it with a tiny model."
        )
        return 0
    chosen.out.mkdir(parents=True, exist_ok=True)
    if len(chosen.part or ()) == 1:
        return measure(chosen, chosen.part[0])
    return measure_all(chosen, [part for part in PARTS if part in (chosen.part or PARTS)])


def arguments() -> argparse.Namespace:
    about = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--part", action="append", choices=PARTS, help="measure this part")
    parser.add_argument(
        "--dry", action="store_true", help="execute all with a tiny model, on a CPU"
    )
    parser.add_argument("--batch", type=int, help="windows in a micro-batch")
    parser.add_argument("--rounds", type=int, help="turns of each contestant")
    parser.add_argument("--mode", choices=MODES, default="default", help="mode of the compiler")
    parser.add_argument("--seconds", type=float, default=510, help="time for all parts together")
    parser.add_argument("--work", type=Path, help="folder of tokens and runs; on a disk")
    return parser.parse_args()


def measure_all(chosen: argparse.Namespace, parts: list[str]) -> int:
    """Measure each part in a process of its own: what one breaks does not stop the others."""
    began, codes = time.monotonic(), []
    for part in parts:
        left = chosen.seconds - (time.monotonic() - began)
        if left < START:
            print(f"NOT MEASURED: {part}: no time is left; run it alone with --part {part}")
            codes.append(1)
            continue
        command = command_of(part, sys.argv[1:])
        try:
            codes.append(subprocess.run(command, check=False, timeout=left).returncode)
        except subprocess.TimeoutExpired:
            print(f"NOT MEASURED: {part}: took longer than the {left:.0f} s that were left")
            codes.append(1)
    print(f"{time.monotonic() - began:.0f} s in all; results in {chosen.out}")
    return int(any(codes))


def command_of(part: str, words: list[str]) -> list[str]:
    """Return the command that measures one part, with the other arguments of this one."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--part", action="append")
    return [sys.executable, __file__, *parser.parse_known_args(words)[1], "--part", part]


def measure(chosen: argparse.Namespace, part: str) -> int:
    """Measure one part in this process."""
    device = Cpu() if chosen.dry else Cuda(chosen.mode)
    changes = {name: getattr(chosen, name) for name in ("batch", "rounds")}
    given = {name: value for name, value in changes.items() if value is not None}
    size = dataclasses.replace(TINY if chosen.dry else GPT2, **given)
    # What is temporary is often kept in memory; /var/tmp is on a disk.
    work = chosen.work or Path("/var/tmp") / f"fundamentallm-bench-{os.getuid()}"
    work.mkdir(parents=True, exist_ok=True)
    runs = Path(tempfile.mkdtemp(prefix="runs-", dir=work))
    began = time.monotonic()
    try:
        with (
            (chosen.out / "bench.stderr").open("a") as errors,
            contextlib.redirect_stderr(errors),
        ):
            found = PARTS[part](Bench(device, size, work, runs))
    finally:
        shutil.rmtree(runs, ignore_errors=True)
    lines = [f"{part}: {goal.line(dry=chosen.dry)}" for goal in found.goals]
    print("\n".join(lines), flush=True)
    facts = {
        "device": device.name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "size": dataclasses.asdict(size),
        "seconds": time.monotonic() - began,
        "lines": lines,
        "figures": found.figures,
    }
    write(chosen.out, part, facts)
    return 0 if chosen.dry or all(goal.met for goal in found.goals) else 1


def write(out: Path, part: str, facts: dict[str, Any]) -> None:
    """Put the results of a part in the place of earlier ones, and write all lines as text."""
    path = out / "bench.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[part] = facts
    path.write_text(json.dumps(known, indent=1, default=str) + "\n")
    lines = [
        f"{one['date']} {one['device']} torch {one['torch']} {line}"
        for one in known.values()
        for line in one["lines"]
    ]
    (out / "bench.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
