"""What a person sees on a terminal: real ones, read by an emulator that knows what they show."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import traceback
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyte
import pytest
import torch

from fundamentallm import Period, PluginError, Run, RunSettings, field, hookimpl, plugin, train
from fundamentallm.testing import compose_tiny
from fundamentallm_progress import Progress, bar
from fundamentallm_progress.streams import BEGIN, END

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROWS = 24


class Terminal:
    """A terminal, and what a child process with it did to it.

    ``work`` runs in the child. ``screens`` are what was to be seen after every picture, without
    empty rows; ``then`` are what is done as soon as a pattern is on the screen.
    """

    def __init__(
        self,
        work: Callable[[], Any],
        columns: int = 110,
        then: dict[str, Callable[[Terminal], None]] | None = None,
        **environment: str,
    ) -> None:
        self._screen = pyte.Screen(columns, ROWS)
        self._stream = pyte.ByteStream(self._screen)
        self._then = dict(then or {})
        self.written = b""
        self.screens: list[list[str]] = []
        torch.set_num_threads(1)  # what other threads hold is lost to a child
        self.child, self._own = pty.fork()
        if self.child == 0:
            for name in ("CI", "COLUMNS", "LINES"):  # a window of its own
                os.environ.pop(name, None)
            os.environ.update({"TERM": "xterm-256color"} | environment)
            _be_a_program(work)
        self._size(columns)
        self._read()
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])
        os.close(self._own)

    @property
    def seen(self) -> list[str]:
        """What is to be seen now."""
        return [row.rstrip() for row in self._screen.display if row.strip()]

    @property
    def cursor_shown(self) -> bool:
        """Whether the next program has a cursor."""
        return not self._screen.cursor.hidden

    def type(self, keys: bytes) -> None:
        """Type something."""
        os.write(self._own, keys)

    def resize(self, columns: int) -> None:
        """Make the window as wide as that."""
        self._screen.resize(ROWS, columns)
        self._size(columns)

    def _size(self, columns: int) -> None:
        fcntl.ioctl(self._own, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))

    def _read(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            select.select([self._own], [], [], 1)
            try:
                part = os.read(self._own, 65536)
            except OSError:  # how Linux reports that the other end is closed
                return
            self.written += part
            *pictures, rest = part.split(END.encode())
            for picture in pictures:
                self._stream.feed(picture + END.encode())
                self.screens.append(self.seen)
            self._stream.feed(rest)
            for pattern in [p for p in self._then if re.search(p, "\n".join(self.seen))]:
                self._then.pop(pattern)(self)
        raise AssertionError(f"the child did not end: {self.seen}")


def _be_a_program(work: Callable[[], Any]) -> None:
    """Do the work as a process of its own would, and end."""
    code = 1
    try:
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(0),
            os.fdopen(1, "w", buffering=1),
            os.fdopen(2, "w", buffering=1),
        )
        logging.getLogger().handlers = []
        logging.getLogger("fundamentallm").handlers = []
        logging.getLogger("fundamentallm").setLevel(logging.NOTSET)  # other tests change it
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("another").addHandler(logging.StreamHandler())
        logging.getLogger("another").propagate = False
        signal.signal(signal.SIGINT, signal.default_int_handler)
        bar.SECONDS = 0.05
        work()
        sys.stdout.flush()
        code = 0
    except PluginError as error:
        print(f"error: {error}", file=sys.stderr)
    except BaseException:  # noqa: BLE001 - nothing of the child may go on as the test
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.fixture(autouse=True, scope="module")
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import here, once, what every child would import for itself, which takes seconds."""
    train(compose_tiny(length=2), run_dir=tmp_path_factory.mktemp("warm") / "run")


@plugin
class Works:
    """Does something long before there is anything to train."""

    parts: int = 6

    @hookimpl
    def build_tokenizer(self, run: Run) -> None:
        for part in range(self.parts + 1):
            run.report("tokenizing", part, self.parts)
            time.sleep(0.05)


@plugin
class Busy:
    """Takes its time, prints, logs, has long tasks, and ends the run in some way."""

    step: float = 0.01
    says: bool = False
    ends: str = ""
    text: str = field(init=False, default="a line that was")

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        time.sleep(self.step)
        if run.progress.step == 15 and self.says:
            print(self.text, "printed")
            logging.getLogger("fundamentallm").warning("%s logged", self.text)
            logging.getLogger("another").warning("%s logged by another", self.text)
            print(self.text, "complained of", file=sys.stderr)
            print("no end, yet", end="", flush=True)
        if run.progress.step == 25:
            self._nest(run)

    def _nest(self, run: Run) -> None:
        for part in range(8):
            run.report("thinking", part, 8)
            run.report("dreaming", part)
            time.sleep(0.07)
        if self.ends == "by an error":
            raise ZeroDivisionError("one by nought")
        if self.ends == "by SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.ends == "by Ctrl-C":
            time.sleep(60)
        run.report("dreaming", 1, 1)
        run.report("thinking", 8, 8)


def trains(folder: Path, *plugins: object, **settings: Any) -> Callable[[], Any]:
    settings = {"length": 60, "log_every": 5, "validate_every": 30} | settings
    return lambda: train(compose_tiny(*plugins, **settings), run_dir=folder / "run")


BAR = "[━─]{8,24}"
FULL = re.compile(
    rf"step +\d+/60 +{BAR} \d+%  loss 0\.\d+  (val/loss 0\.\d+  )?lr 0\.01  "
    r"[\d.]+ tokens/s  [\d.]+ steps/s(  0:0\d left)?"
)
HANDED_OVER = re.compile(rb"\x1b\[\?2026h.*?\x1b\[\?2026l", re.DOTALL)


def test_a_bar_shows_the_run_and_each_task_below_it_while_it_lasts(tmp_path: Path) -> None:
    terminal = Terminal(trains(tmp_path, Progress(), Works(), Busy()))
    assert terminal.code == 0
    assert any(
        re.fullmatch(rf"  tokenizing {BAR} \d+%  0:0\d", s[0]) for s in terminal.screens if s
    )
    nested = [s for s in terminal.screens if len(s) == 3]
    assert nested
    for training, thinking, dreaming in nested:
        assert training.startswith("step 25/60 ")
        assert re.fullmatch(rf"  thinking {BAR} \d+%  0:0\d", thinking)
        assert re.fullmatch(rf"  dreaming {BAR} (\d  )?0:0\d", dreaming)
    first = next(i for i, s in enumerate(terminal.screens) if s and s[0].startswith("step"))
    for seen in terminal.screens[first:]:
        assert seen[0].startswith("step "), "the bar stays where it is, and is never gone"
    (last,) = terminal.seen
    assert FULL.fullmatch(last)
    assert last.startswith("step 60/60 ")
    assert "left" not in last
    assert any(s and FULL.fullmatch(s[0]) and s[0].endswith("left") for s in terminal.screens)


def test_output_of_other_code_appears_unchanged_above_the_bar(tmp_path: Path) -> None:
    busy = Busy(says=True)
    busy.text = 30 * "word " + "https://example.org/" + 100 * "x"
    terminal = Terminal(trains(tmp_path, Progress(), busy))
    whats = ("printed", "logged", "logged by another", "complained of")
    lines = [f"{busy.text} {what}" for what in whats]
    for line in lines:
        assert terminal.written.count(f"{line}\r\n".encode()) == 1, (
            "whole, and not broken into rows"
        )
    text = "".join(row.ljust(110) for row in terminal.seen)
    assert all(line in text for line in lines)
    for seen in terminal.screens:
        bars = [row for row in seen if row.startswith("step")]
        assert len(bars) <= 1
        assert seen[-1].startswith(("step", "  ")) if bars else True
    assert [row for row in terminal.seen if row.startswith("step")] == [terminal.seen[-2]]
    assert terminal.seen[-1] == "no end, yet"


def test_all_that_is_written_is_whole_pictures(tmp_path: Path) -> None:
    terminal = Terminal(trains(tmp_path, Progress(), Works(), Busy(says=True)))
    assert terminal.written.count(BEGIN.encode()) == terminal.written.count(END.encode())
    assert HANDED_OVER.sub(b"", terminal.written) == b"no end, yet"


@pytest.mark.parametrize("ends", ["by an error", "by Ctrl-C", "by SIGKILL"])
def test_the_terminal_is_left_in_order(ends: str, tmp_path: Path) -> None:
    presses: dict[str, Callable[[Terminal], None]] = {
        "thinking.* 88%": lambda terminal: terminal.type(b"\x03"),
        "SIGINT": lambda terminal: terminal.type(b"\x03"),
    }
    then = presses if ends == "by Ctrl-C" else {}
    terminal = Terminal(trains(tmp_path, Progress(), Busy(ends=ends)), then=then)
    assert terminal.cursor_shown
    if ends == "by SIGKILL":
        assert terminal.code == -signal.SIGKILL
        return
    said = {"by an error": "error: ", "by Ctrl-C": "SIGINT: stopping"}[ends]
    assert any(row.startswith(said) for row in terminal.seen)
    bars = [row for row in terminal.seen if "━" in row]
    assert len(bars) == 1, "what was under way is gone; ^C has broken no row"
    assert re.match("step 2[45]/60 ", bars[0])


def test_a_row_fits_into_a_narrow_terminal_with_what_matters_most(tmp_path: Path) -> None:
    terminal = Terminal(trains(tmp_path, Progress(), Busy()), columns=40)
    assert all(len(row) < 40 for seen in terminal.screens for row in seen)
    assert all(len([r for r in seen if r.startswith("step")]) <= 1 for seen in terminal.screens)
    rows = [seen[0] for seen in terminal.screens if seen]
    assert any(re.search(r"\d%  loss 0\.\d+  \d:\d\d left$", row) for row in rows)
    (last,) = terminal.seen
    assert re.fullmatch(r"step 60/60 .*100%  loss 0\.\d+", last)


def test_a_terminal_too_narrow_for_anything_holds_one_row(tmp_path: Path) -> None:
    terminal = Terminal(trains(tmp_path, Progress(), Busy()), columns=10)
    assert all(len(row) < 10 for seen in terminal.screens for row in seen)
    assert terminal.seen == ["step 60"]


@pytest.mark.parametrize("columns", [50, 150])
def test_the_bar_follows_the_size_of_the_window(columns: int, tmp_path: Path) -> None:
    then: dict[str, Callable[[Terminal], None]] = {
        "loss": lambda terminal: terminal.resize(columns)
    }
    terminal = Terminal(trains(tmp_path, Progress(), Busy()), then=then, columns=100)
    (last,) = terminal.seen
    assert last.startswith("step 60/60 ")
    assert len(last) < columns
    assert ("steps/s" in last) == (columns == 150)


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "unknown"}, {"CI": "true"}])
def test_where_nothing_can_be_drawn_there_are_plain_lines(
    environment: dict[str, str], tmp_path: Path
) -> None:
    terminal = Terminal(trains(tmp_path, Progress(), Busy()), **environment)
    assert b"\x1b" not in terminal.written
    assert any(row.startswith("step 30/60 (50%)  loss 0.") for row in terminal.seen)
    assert terminal.seen[-1].startswith("step 60/60 (100%)  loss 0.")


COLOUR = re.compile(rb"\x1b\[[0-9;]*(?:3[0-7]|38;|9[0-7])[0-9;]*m")


@pytest.mark.parametrize("wanted", [True, False])
def test_colours_can_be_left_out(wanted: bool, tmp_path: Path) -> None:
    environment = {} if wanted else {"NO_COLOR": "1"}
    terminal = Terminal(trains(tmp_path, Progress(), Busy(), length=35), **environment)
    assert bool(COLOUR.search(terminal.written)) == wanted
    assert "━" in terminal.seen[-1]


def test_a_terminal_without_these_characters_has_a_bar_of_others(tmp_path: Path) -> None:
    def work() -> None:
        sys.stderr = os.fdopen(2, "w", encoding="ascii", buffering=1)
        trains(tmp_path, Progress(), Busy())()

    terminal = Terminal(work)
    assert re.match(r"step 60/60 #{8,24} 100%", terminal.seen[-1])


def test_standard_error_in_a_file_gets_plain_lines_and_the_terminal_nothing(tmp_path: Path) -> None:
    def work() -> None:
        sys.stderr = (tmp_path / "errors").open("w")
        trains(tmp_path, Progress(), Busy())()

    terminal = Terminal(work)
    assert terminal.written == b""
    lines = (tmp_path / "errors").read_text().splitlines()
    assert lines[-1].startswith("step 60/60 (100%)")
    assert not any("\x1b" in line for line in lines)


def test_standard_output_in_a_file_is_left_alone(tmp_path: Path) -> None:
    def work() -> None:
        sys.stdout = (tmp_path / "out").open("w")
        trains(tmp_path, Progress(), Busy(says=True))()

    terminal = Terminal(work)
    assert (tmp_path / "out").read_text() == "a line that was printed\nno end, yet"
    assert not any("printed" in row for row in terminal.seen)


def test_quiet_is_quiet_on_a_terminal(tmp_path: Path) -> None:
    terminal = Terminal(trains(tmp_path, Progress(quiet=True), Works(), Busy()))
    assert terminal.written == b""


def test_a_terminal_that_goes_away_does_not_end_the_run(tmp_path: Path) -> None:
    @plugin
    class HangsUp:
        """Takes the terminal away."""

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 20:
                os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
            if run.progress.step == 50:
                logging.getLogger().warning("half a second later")

    def work() -> None:
        logging.getLogger().handlers = [logging.FileHandler(tmp_path / "log")]
        run = trains(tmp_path, Progress(), HangsUp(), Busy())()
        (tmp_path / "outcome").write_text(run.outcome)

    Terminal(work)
    assert (tmp_path / "outcome").read_text() == "finished"
    log = (tmp_path / "log").read_text()
    assert log.count("progress failed and is muted") == 1
    assert log.index("progress failed and is muted") < log.index("half a second later")


class Written(io.StringIO):
    """A terminal that is read afterwards."""

    def isatty(self) -> bool:
        return True

    @property
    def seen(self) -> list[str]:
        """What is to be seen."""
        screen = pyte.Screen(100, ROWS)
        pyte.Stream(screen).feed(self.getvalue().replace("\n", "\r\n"))
        return [row.rstrip() for row in screen.display if row.strip()]


@contextmanager
def a_bar(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[tuple[bar.Bar, Written]]:
    """Put a terminal in place of standard error, and a bar on it that does not look by itself."""
    monkeypatch.setattr(bar, "SECONDS", 1000.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with redirect_stderr(Written()) as written:
        made = bar.Bar(Run(RunSettings(length=Period(100)), {}, folder), [])
        yield made, written
        made.close()


def test_a_line_of_others_stands_above_a_bar_that_is_up_to_date(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with a_bar(monkeypatch, tmp_path) as (found, written):
        found.start_training()
        found.show_task("saving", 3, 10)
        found.refresh()
        assert written.seen[-1].startswith("  saving ")
        found.show_task("saving", 10, 10)
        print("saved", file=sys.stderr)
        assert [row.split()[0] for row in written.seen] == ["saved", "step"]


def test_output_that_restarts_its_line_shows_what_it_wrote_last(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with a_bar(monkeypatch, tmp_path) as (found, written):
        found.start_training()
        for percent in (10, 50, 100):
            sys.stderr.write(f"\rdownloading {percent}%")
        sys.stderr.write("\nwindows\r\n")
        found.refresh()
        assert written.seen[:2] == ["downloading 100%", "windows"]
        assert written.seen[2].startswith("step 0/100 ")


def test_tasks_before_any_training_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with a_bar(monkeypatch, tmp_path) as (found, written):
        for task in ("reading", "tokenizing"):
            found.show_task(task, 1, 3)
            found.refresh()
            assert written.seen[-1].startswith(f"  {task} ")
            assert sys.stderr is not written
            found.show_task(task, 3, 3)
            assert written.seen == []
            assert sys.stderr is written


PROGRAM = """
plugins = ["text", "gpt", "adamw", "checkpoint", "sample", "console", "progress"]
[run]
length = "40 steps"
validate_every = "20 steps"
log_every = "5 steps"
device = "cpu"
[text]
path = "text.txt"
context_length = 16
batch_size = 4
validation_batches = 1500
cache_dir = "cache"
[gpt]
num_layers = 2
num_heads = 2
d_model = 64
[sample]
max_tokens = 10
"""


@pytest.mark.slow
def test_the_command_line_shows_a_run_and_its_continuation(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged. " * 20_000)
    (tmp_path / "small.toml").write_text(PROGRAM)
    command = Path(sys.executable).with_name("fundamentallm")

    def calls(*words: str) -> Callable[[], Any]:
        return lambda: subprocess.run([command, *words], cwd=tmp_path, check=True)

    first = Terminal(calls("train", "small.toml"))
    assert any(seen[-1].startswith("  validation ") for seen in first.screens if seen)
    assert first.seen[-1] == "finished after 40 steps: runs/small"
    assert first.seen[-2].startswith("step 40/40 ")
    again = Terminal(calls("resume", "runs/small", "--set", "run.length=200"))
    bars = [row for seen in again.screens for row in seen if row.startswith("step ")]
    assert [row for row in bars if "left" in row]
    assert all(row.startswith(("step 4", "step 5", "step 6")) for row in bars[:1])
    assert again.seen[-2].startswith("step 200/200 ")
    assert again.cursor_shown
