"""The speed and the memory of one batch size, measured in a process of its own.

What a process has allocated stays with it in part, and a host without memory kills processes: so
that each trial starts from nothing, and takes nobody along.
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


class Wish(NamedTuple):
    """What to measure: settings and the choice made on the command line, sizes, steps."""

    settings: str
    choice: Mapping[str, Sequence[str]]
    low: int
    high: int
    steps: int


class Trial(NamedTuple):
    """What came of one batch size; ``code`` is the exit code of the error, 0 without one."""

    code: int = 0
    error: str = ""
    seconds: float = 0.0
    """Of one step."""
    speed: float = 0.0
    """Tokens per second."""
    peak: int = 0
    """Bytes."""

    def failure(self) -> FundamentalError:
        """Return the error that ended the trial."""
        kinds = {kind.exit_code: kind for kind in FundamentalError.__subclasses__()}
        return kinds.get(self.code, FundamentalError)(self.error)


@plugin
class Stopwatch:
    """Times steps, the first aside: it makes ready what the others use again."""

    seconds: list[float] = field(init=False, factory=list)
    tokens: int = field(init=False, default=0)
    _started: float = field(init=False, default=0.0)

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        """Start."""
        catch_up(run.device)
        self._started = time.perf_counter()

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        """Stop."""
        catch_up(run.device)
        if run.progress.step > 1:
            self.seconds.append(time.perf_counter() - self._started)
            self.tokens += run.progress.tokens - run.progress.before[1]


def measure(wish: Wish, choice: Mapping[str, Sequence[str]], scratch: Path) -> Trial:
    """Run a trial with this ``choice`` in a process of its own, and wait for it."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        request = {"settings": wish.settings, "choice": choice, "steps": wish.steps}
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        # -P: a module in the user's folder must not stand in for one of ours.
        words = [sys.executable, "-P", "-m", "fundamentallm_tuning.measuring", name]
        done = subprocess.run(
            words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode == -signal.SIGKILL:
            return Trial(
                OutOfMemoryError.exit_code, "its process was killed, as a host without memory does"
            )
        try:
            return Trial(*json.loads((folder / "result.json").read_text(encoding="utf-8")))
        except OSError:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            return Trial(1, f"the trial ended with exit code {done.returncode}: {last}")


def run_trial(request: Mapping[str, Any], folder: Path) -> Trial:
    """Make the steps of a trial in this process."""
    from fundamentallm import train  # and torch, which who waits for a trial does not need

    watch = Stopwatch()
    try:
        composed = compose(request["settings"], **request["choice"])
        run = ended(train(lean(composed, request["steps"], watch), run_dir=folder / "run"))
    except FundamentalError as error:
        return Trial(error.exit_code, str(error))
    # The median: a step that something else on the machine held up says nothing of the size.
    seconds, count = median(watch.seconds), len(watch.seconds)
    return Trial(0, "", seconds, watch.tokens / count / seconds, peak_memory(run.device))


def main() -> None:
    """Do what ``request.json`` in the folder asks for, and leave ``result.json`` there."""
    with contextlib.suppress(OSError):  # where memory ends, this process is to go, and no other
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    folder = Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    result = run_trial(request, folder)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
