"""Count the machine instructions of a step, with valgrind's callgrind.

The training process stops at each mark and waits for a line; meanwhile its instrumentation is
switched on (``vgdb`` talks to it), or what was counted since the last mark is written to a file.
So neither the start nor the end of the program is counted, and nothing is estimated.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import noop
from noop import BETWEEN, PERIOD

MARKS = (PERIOD[0], *BETWEEN, PERIOD[1])
TOOLS = ("valgrind", "vgdb")


def counts(loop: str) -> dict[str, float]:
    """Return the instructions per step of a loop, by what the steps include."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counted"
        command = [
            "valgrind",
            "--tool=callgrind",
            "--instr-atstart=no",
            f"--callgrind-out-file={out}",
            f"--vgdb-prefix={folder}/vgdb",
            sys.executable,
            __file__,
            loop,
        ]
        # A seed for hashing, so that the same is counted every time.
        environment = {
            **os.environ,
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": folder,
        }
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            for mark in MARKS:
                line = child.stdout.readline()
                assert line == f"{mark}\n", f"valgrind ended early: {line!r}"
                order = ["instrumentation", "on"] if mark == MARKS[0] else ["dump"]
                subprocess.run(
                    ["vgdb", f"--vgdb-prefix={folder}/vgdb", f"--pid={child.pid}", *order],
                    check=True,
                    capture_output=True,
                )
                child.stdin.write("go on\n")
                child.stdin.flush()
            child.kill()
        totals = [_total(out.with_name(f"counted.{n}")) for n in (1, 2, 3)]
    return {
        "period": sum(totals) / (PERIOD[1] - PERIOD[0]),
        "between": totals[1] / (BETWEEN[1] - BETWEEN[0]),
    }


def available() -> bool:
    """Tell whether the tools are installed."""
    return all(shutil.which(tool) for tool in TOOLS)


def _total(path: Path) -> int:
    found = re.search(r"^(?:totals|summary): (\d+)$", path.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def _wait(mark: int) -> None:
    os.write(1, f"{mark}\n".encode())
    os.read(0, 100)


if __name__ == "__main__":
    noop.LOOPS[sys.argv[1]]({mark: partial(_wait, mark) for mark in MARKS})
