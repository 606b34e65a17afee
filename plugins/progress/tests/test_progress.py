"""What a person sees of a run: on a terminal, in a log file, and not at all."""

from __future__ import annotations

import logging
import os
import pty
import re
import signal
import sys
import threading
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundamentallm import Period, PluginError, Run, RunSettings, hookimpl, plugin
from fundamentallm.testing import PluginContract, Recorder, TinyRun
from fundamentallm_progress import Progress
from fundamentallm_progress.pace import Pace, clock_face, short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class TestContract(PluginContract):
    plugin = Progress


@plugin
class Works:
    """Does something long, in parts."""

    parts: int = 3

    @hookimpl
    def build_tokenizer(self, run: Run) -> object:
        for part in range(self.parts + 1):
            run.report("tokenizing", part, self.parts)
        return object()


# Without a terminal.


def test_each_row_is_a_plain_line_on_standard_error(
    tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(Progress(), Works(), length=4, validate_every=4)
    out, err = capsys.readouterr()
    assert out == ""
    first, last = err.splitlines()
    assert re.fullmatch(
        r"step 2/4 \(50%\)  loss 0\.\d+  lr 0\.01  [\d.]+k? tokens/s  0:00 left", first
    )
    assert f"val/loss {run.history[-1]['val/loss']:.4g}" in last
    assert last.startswith("step 4/4 (100%)  loss")


def test_shows_the_metrics_that_were_asked_for(
    tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run(Progress(metrics=["train/tokens", "no/such"]), length=2)
    assert re.match(r"step 2/2 \(100%\)  tokens 8  \S+ tokens/s", capsys.readouterr().err)


def test_quiet_is_quiet(tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run(Progress(quiet=True), Works(), length=4)
    assert capsys.readouterr() == ("", "")


def test_a_length_in_tokens_has_a_share_and_no_number_of_steps(
    tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run(Progress(), length="16 tokens")
    assert "step 2 (50%)" in capsys.readouterr().err


def test_a_step_between_two_rows_calls_nothing_of_it(tiny_run: TinyRun) -> None:
    calls: list[str] = []

    def watch(frame: object, event: str, _: object) -> None:
        code = frame.f_code  # type: ignore[attr-defined]
        if event == "call" and "fundamentallm_progress" in code.co_filename:
            calls.append(code.co_name)

    @plugin
    class Watches:
        @hookimpl
        def on_step_start(self, run: Run) -> None:
            if run.progress.step == 2:
                sys.setprofile(watch)

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 9:
                sys.setprofile(None)

    trace = Recorder()
    tiny_run(Progress(), Watches(), length=12, log_every=12, trace=trace)
    assert trace.names.count("on_step_end") == 12
    assert calls == []


# On a terminal.


class Terminal:
    """A terminal of 120 columns; what is written to it is read at once, and kept."""

    def __init__(self) -> None:
        self._own, far = pty.openpty()
        self.file = os.fdopen(far, "w")
        self._parts: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def written(self) -> str:
        """Return all that was written, once no more will be."""
        self.file.close()
        self._reader.join()
        os.close(self._own)
        return b"".join(self._parts).decode()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self._own, 65536)
            except OSError:  # how Linux tells that the other end is closed
                return
            self._parts.append(part)


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Terminal]]:
    """Puts a terminal in place of standard output and error, and of what logging writes to."""
    logger = logging.getLogger("fundamentallm")
    before = list(logger.handlers)

    def start(term: str = "xterm", columns: int = 120) -> Terminal:
        found = Terminal()
        monkeypatch.setenv("TERM", term)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "stdout", found.file)
        monkeypatch.setattr(sys, "stderr", found.file)
        logger.addHandler(logging.StreamHandler())
        return found

    yield start
    logger.handlers = before


@plugin
class Busy:
    """Takes its time, prints, logs, has a long task, and ends the run in some way."""

    ends: str = ""

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        time.sleep(0.03)
        if run.progress.step == 15:
            print("a line that was printed")
            logging.getLogger("fundamentallm").warning("a line that was logged")
            run.report("thinking", 1, 2)
        if run.progress.step == 35:
            run.report("thinking", 2, 2)
            if self.ends == "by an error":
                raise ZeroDivisionError("one by nought")
            if self.ends == "by Ctrl-C, twice":
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)


def screen(written: str) -> list[str]:
    """Return what is to be seen after all: the few control sequences of a bar, carried out."""
    rows: list[str] = [""]
    row = column = 0
    parts = re.compile(r"(\x1b\[)(\??[\d;]*)([A-Za-z])|([^\x1b])", re.DOTALL)
    for escape, argument, letter, char in parts.findall(written):
        if escape:
            row -= int(argument or 1) if letter == "A" else 0
            if letter == "K":
                rows[row] = "" if argument == "2" else rows[row][:column]
        elif char == "\r":
            column = 0
        elif char == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        else:
            rows[row] = rows[row].ljust(column)[:column] + char + rows[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in rows if line.strip()]


SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


def test_a_bar_shows_the_run_and_what_others_write_stands_above_it(
    tiny_run: TinyRun, on_terminal: Callable[..., Terminal]
) -> None:
    terminal = on_terminal()
    before = sys.stdout, sys.stderr, [h.stream for h in logging.getLogger("fundamentallm").handlers]
    tiny_run(Progress(), Works(), Busy(), length=40, log_every=5)
    after = sys.stdout, sys.stderr, [h.stream for h in logging.getLogger("fundamentallm").handlers]
    assert after == before
    written = terminal.written()
    assert "thinking" in written
    assert SHOW_CURSOR in written.partition("step ")[0], "perhaps no training follows a task"
    assert re.search(r"step [1-3]?\d/40", written), "it moves on between start and end"
    seen = screen(written)
    assert re.fullmatch(r"tokenizing ━+ 100%", seen[0])
    assert seen[1:3] == ["a line that was printed", "a line that was logged"]
    assert re.fullmatch(
        r"step 40/40 ━+ 100%  loss 0\.\d+  val/loss 0\.\d+  lr 0\.01  [\d.]+ tokens/s  0:00 left",
        seen[3],
    )
    assert seen[4:] == []


@pytest.mark.parametrize(
    ("ends", "error"), [("by an error", PluginError), ("by Ctrl-C, twice", None)]
)
def test_the_terminal_is_left_in_order(
    ends: str, error: type[Exception] | None, tiny_run: TinyRun, on_terminal: Callable[..., Terminal]
) -> None:
    terminal = on_terminal()
    with pytest.raises(error) if error else nullcontext():
        tiny_run(Progress(), Works(), Busy(ends=ends), length=40)
    print("the end", file=sys.stderr)
    written = terminal.written()
    assert written.rindex(SHOW_CURSOR) > written.rindex(HIDE_CURSOR)
    seen = screen(written)
    assert [line.split()[0] for line in seen if "━" in line] == ["tokenizing", "step"]
    assert seen[-1] == "the end"


def test_a_dumb_terminal_gets_plain_lines(
    tiny_run: TinyRun, on_terminal: Callable[..., Terminal]
) -> None:
    terminal = on_terminal(term="dumb")
    tiny_run(Progress(), Works(), length=4)
    written = terminal.written()
    assert "\x1b" not in written
    assert "step 4/4 (100%)  loss" in written


def test_a_narrow_terminal_keeps_one_line(
    tiny_run: TinyRun, on_terminal: Callable[..., Terminal]
) -> None:
    terminal = on_terminal(columns=40)
    tiny_run(Progress(), length=4)
    (line,) = screen(terminal.written())
    assert line.startswith("step 4/4 ")
    assert len(line) <= 40


def test_what_goes_to_a_file_still_does(
    tiny_run: TinyRun, on_terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    terminal = on_terminal()
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        tiny_run(Progress(), Busy(), length=16)
    assert (tmp_path / "out").read_text() == "a line that was printed\n"
    assert "printed" not in terminal.written()


# Speed and time left.


def a_run(tmp_path: Path, length: int = 100) -> Run:
    return Run(RunSettings(length=Period(length)), {}, tmp_path)


def test_only_the_work_of_this_process_counts(tmp_path: Path) -> None:
    now = [50.0]
    run = a_run(tmp_path)
    run.progress.step, run.progress.tokens, run.progress.samples = 60, 6000, 600
    pace = Pace(run, lambda: now[0])
    assert (pace.speed(), pace.left(), pace.share) == ("", "", 0.6)
    now[0] += 2.0
    run.progress.step, run.progress.tokens, run.progress.samples = 70, 7000, 700
    pace.look()
    assert (pace.speed(), pace.left(), pace.share) == ("500 tokens/s", "0:06", 0.7)


def test_samples_count_where_there_are_no_tokens(tmp_path: Path) -> None:
    now = [0.0]
    run = a_run(tmp_path)
    pace = Pace(run, lambda: now[0])
    now[0], run.progress.step, run.progress.samples = 2.0, 1, 3000
    pace.look()
    assert pace.speed() == "1.5k samples/s"


def test_speed_follows_a_change_of_it(tmp_path: Path) -> None:
    now = [0.0]
    run = a_run(tmp_path, 10**6)
    pace = Pace(run, lambda: now[0])
    for tokens in [1] * 100 + [1000] * 100:
        now[0] += 1.0
        run.progress.step += 1
        run.progress.samples += 1
        run.progress.tokens += tokens
        pace.look()
    assert pace.speed() == "1k tokens/s"


@settings(deadline=None)
@given(st.floats(0, 1e6), st.integers(1, 10**6), st.integers(0, 10**6))
def test_the_time_left_is_never_negative(seconds: float, length: int, step: int) -> None:
    from pathlib import Path

    now = [0.0]
    run = a_run(Path(), length)
    pace = Pace(run, lambda: now[0])
    now[0], run.progress.step = seconds, step
    pace.look()
    assert 0 <= pace.share <= 1
    assert not pace.left().startswith("-")


@pytest.mark.parametrize(
    ("seconds", "face"), [(0.9, "0:00"), (61, "1:01"), (3725.0, "1:02:05"), (360000, "100:00:00")]
)
def test_a_time_is_written_as_on_a_clock(seconds: float, face: str) -> None:
    assert clock_face(seconds) == face


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1234, "1.23k"), (1.5e6, "1.5M"), (2e9, "2G")]
)
def test_a_number_is_short(number: float, text: str) -> None:
    assert short(number) == text
