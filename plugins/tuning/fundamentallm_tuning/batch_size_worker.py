"""Measure the speed and the memory of one batch size in a separate process.

A process keeps a part of the memory that it has allocated, and a host without memory kills
processes. In a process of its own, each trial starts with empty memory, and only it is killed.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from fundamentallm import (
    FundamentalError,
    OutOfMemoryError,
    compose,
    field,
    hookimpl,
    plugin,
)
from fundamentallm_tuning.trial import catch_up, ended, lean, peak_memory

if TYPE_CHECKING:
    from fundamentallm import Run


class Request(NamedTuple):
    """What to measure: the settings and options of the command line, sizes, steps."""

    settings: str
    choice: Mapping[str, Sequence[str]]
    low: int
    high: int
    steps: int


class Measured(NamedTuple):
    """The result for one batch size; ``code`` is the exit code of the error, 0 without one."""

    code: int = 0
    error: str = ""
    seconds: float = 0.0
    """Median time of a step."""
    speed: float = 0.0
    """Tokens per second."""
    peak: int = 0
    """Peak memory in bytes."""

    def failure(self) -> FundamentalError:
        """Return the error that ended the trial."""
        kinds = {kind.exit_code: kind for kind in FundamentalError.__subclasses__()}
        return kinds.get(self.code, FundamentalError)(self.error)


@plugin
class Stopwatch:
    """Measure the times of all steps but the first, which initializes what the others use."""

    seconds: list[float] = field(init=False, factory=list)
    tokens: int = field(init=False, default=0)
    _started: float = field(init=False, default=0.0)

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        """Start the clock."""
        catch_up(run.device)
        self._started = time.perf_counter()

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        """Stop the clock."""
        catch_up(run.device)
        if run.progress.step > 1:
            self.seconds.append(time.perf_counter() - self._started)
            self.tokens += run.progress.tokens - run.progress.before[1]


def measure(request: Request, choice: Mapping[str, Sequence[str]], scratch: Path) -> Measured:
    """Run a trial with the options ``choice`` in a separate process, and wait for it."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        facts = {"settings": request.settings, "choice": choice, "steps": request.steps}
        (folder / "request.json").write_text(json.dumps(facts), encoding="utf-8")
        # -P: a module in the user's folder must not shadow one of ours.
        words = [sys.executable, "-P", "-m", "fundamentallm_tuning.batch_size_worker", name]
        done = subprocess.run(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode == -signal.SIGKILL:
            return Measured(
                OutOfMemoryError.exit_code, "its process was killed, probably for lack of memory"
            )
        try:
            return Measured(*json.loads((folder / "result.json").read_text(encoding="utf-8")))
        except OSError:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            return Measured(1, f"the trial ended with exit code {done.returncode}: {last}")


def run_trial(request: Mapping[str, Any], folder: Path) -> Measured:
    """Run the steps of a trial in this process."""
    from fundamentallm import train  # imports torch, which the waiting process does not need

    watch = Stopwatch()
    try:
        composed = compose(request["settings"], **request["choice"])
        run = ended(train(lean(composed, request["steps"], watch), run_dir=folder / "run"))
    except FundamentalError as error:
        return Measured(error.exit_code, str(error))
    # The median, since other work on the machine may delay a step.
    seconds, count = median(watch.seconds), len(watch.seconds)
    return Measured(0, "", seconds, watch.tokens / count / seconds, peak_memory(run.device))


def main() -> None:
    """Run the trial of ``request.json`` in the folder, and write ``result.json`` there."""
    with contextlib.suppress(OSError):  # out of memory, the kernel should kill this process first
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    result = run_trial(request, folder)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
