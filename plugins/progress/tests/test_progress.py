"""What a person sees of a run without a terminal, how fast it is said to be, and for how long."""

from __future__ import annotations

import io
import re
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fundamentallm import Period, Run, RunSettings, field, hookimpl, plugin
from fundamentallm.testing import PluginContract, Recorder, TinyRun
from fundamentallm_progress import Progress
from fundamentallm_progress.bar import Bar
from fundamentallm_progress.lines import Lines
from fundamentallm_progress.notebook import Notebook
from fundamentallm_progress.pace import Pace, clock_face, short
from fundamentallm_progress.streams import BEGIN
from fundamentallm_progress.view import View

if TYPE_CHECKING:
    from pathlib import Path


class TestContract(PluginContract):
    plugin = Progress


@pytest.fixture(autouse=True)
def _no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@plugin
class Works:
    """Does something long, in parts."""

    parts: int = 3

    @hookimpl
    def build_tokenizer(self, run: Run) -> None:
        for part in range(self.parts + 1):
            run.report("tokenizing", part, self.parts)


# Without a terminal.


def test_each_row_is_a_plain_line_on_standard_error(
    tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run(Progress(), Works(), length=4, validate_every=4)
    out, err = capsys.readouterr()
    assert out == ""
    first, last = err.splitlines()
    assert re.fullmatch(r"step 2/4 \(50%\)  loss 0\.\d+  lr 0\.01", first)
    val_loss = f"{run.history[-1]['val/loss']:.4g}"
    assert re.fullmatch(
        rf"step 4/4 \(100%\)  loss 0\.\d+  val/loss {val_loss}  lr 0\.01  "
        r"[\d.]+k? tokens/s  [\d.]+k? steps/s",
        last,
    )


def test_shows_the_metrics_that_were_asked_for(
    tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run(Progress(metrics=["train/tokens", "no/such"]), length=2)
    assert capsys.readouterr().err == "step 2/2 (100%)  tokens 8\n"


def test_quiet_is_quiet(tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run(Progress(quiet=True), Works(), length=4)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        ("4 steps", "step 2/4 (50%)"),
        ("16 tokens", "step 2  8/16 tokens (50%)"),
        ("1e9 tokens", "step 2  8/1G tokens (0%)"),
        ("2 epochs", "step 2  0.50/2 epochs (25%)"),
        ("2 hours", "step 2  0:00/2:00:00 (0%)"),
    ],
)
def test_progress_is_shown_in_the_unit_of_the_length(
    length: str, expected: str, tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    @plugin
    class Stops:
        @hookimpl
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 2:
                run.stop("enough")

    tiny_run(Progress(), Works(), Stops(), length=length)
    assert capsys.readouterr().err.splitlines()[0].startswith(f"{expected}  loss 0.")


def test_lines_are_a_second_apart_but_for_validations_and_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, run = Clock(), a_run(tmp_path, 1000)
    lines = Lines(run, ["train/loss"], clock)
    lines.start_training()
    for step in range(1, 401):
        run.progress.step = step
        clock.now += 0.01
        run.ending = step == 400
        lines.show_metrics({"train/loss": 1.0}, validated=step in (150, 151))
    steps = [int(line.split("/")[0][5:]) for line in capsys.readouterr().err.splitlines()]
    assert len(steps) == 7
    assert {1, 150, 151, 400} <= set(steps)


def test_a_long_task_has_a_line_every_ten_seconds_and_a_last_one_and_a_short_one_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    lines = Lines(a_run(tmp_path), [], clock)
    for part in range(10_001):
        lines.show_task("long", part, 10_000)
        clock.now += 0.003
    for part in range(10_001):
        lines.show_task("short", part, 10_000)
        clock.now += 0.0009
    lines.show_task("unknown", 0, None)
    clock.now += 11
    lines.show_task("unknown", 3000, None)
    expected = ["long: 33%", "long: 67%", "long: 100%", "unknown: 3,000"]
    assert capsys.readouterr().err.splitlines() == expected


def test_a_step_between_two_rows_calls_no_code_of_progress(tiny_run: TinyRun) -> None:
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


# Speed and time left.


def a_run(tmp_path: Path, length: int | str = 100) -> Run:
    return Run(RunSettings(length=Period.parse(length)), {}, tmp_path)


def goes(run: Run, clock: Clock, steps: int = 1, seconds: float = 2.0) -> None:
    """Make steps of ten samples, a hundred tokens, and some seconds."""
    clock.now += seconds * steps
    run.progress.step += steps
    run.progress.samples += 10 * steps
    run.progress.tokens += 100 * steps
    run.progress.seconds += seconds * steps


@pytest.mark.parametrize(
    ("length", "left"),
    [("100 steps", "0:34"), ("10_000 tokens", "0:34"), ("2 epochs", "0:34"), ("1 hours", "57:14")],
)
def test_only_the_work_of_this_process_counts(length: str, left: str, tmp_path: Path) -> None:
    clock, run = Clock(), a_run(tmp_path, length)
    run.progress.epoch_samples = 500
    goes(run, Clock(), 80)
    pace = Pace(run, clock)
    assert pace.speeds() == []
    assert pace.left() == ("57:20" if "hours" in length else ""), "of time it is known at once"
    goes(run, clock, seconds=2.0)
    pace.look()
    goes(run, clock, steps=2)
    pace.look()
    assert pace.speeds() == ["50 tokens/s", "0.5 steps/s"]
    assert pace.left() == left


def test_the_first_step_of_a_process_is_left_out_as_soon_as_there_are_others(
    tmp_path: Path,
) -> None:
    clock, run = Clock(), a_run(tmp_path)
    pace = Pace(run, clock)
    goes(run, clock, seconds=60.0)
    pace.look()
    assert (pace.speeds(), pace.left()) == ([], ""), "nothing rather than nonsense"
    goes(run, clock)
    pace.look()
    assert (pace.speeds()[1], pace.left()) == ("0.5 steps/s", "3:16")


def test_the_first_line_of_many_steps_has_a_speed(tmp_path: Path) -> None:
    clock, run = Clock(), a_run(tmp_path)
    pace = Pace(run, clock)
    goes(run, clock, steps=10)
    pace.look()
    assert (pace.speeds()[1], pace.left()) == ("0.5 steps/s", "3:00")


def test_steps_that_take_longer_than_a_look_have_a_speed(tmp_path: Path) -> None:
    clock, run = Clock(), a_run(tmp_path)
    pace = Pace(run, clock)
    for _ in range(4):
        for _ in range(400):
            clock.now += 0.5
            pace.look()
        goes(run, clock, seconds=0.0)
        pace.look()
    for _ in range(300):
        assert pace.speeds()[1] == "0.005 steps/s"
        clock.now += 0.5
        pace.look()


def test_time_outside_of_steps_does_not_change_the_speed_and_counts_for_the_time_left(
    tmp_path: Path,
) -> None:
    clock, run = Clock(), a_run(tmp_path)
    view = View(run, [], clock)
    view.start_training()
    view.follow("compiling", 0, None)
    goes(run, clock, seconds=300.0)
    view.follow("compiling", 1, 1)
    for _ in range(9):
        goes(run, clock)
        view.facts()
    assert view.facts() == ["10%", "50 tokens/s", "0.5 steps/s", "3:00 left"]
    for part in range(1, 10):  # nine steps took 18 seconds, and so does this
        view.follow("validation", part, 10)
        clock.now += 2.0
        assert view.facts() == ["10%", "50 tokens/s", "0.5 steps/s", "3:00 left"]
    view.follow("validation", 10, 10)
    assert view.facts() == ["10%", "50 tokens/s", "0.5 steps/s", "6:00 left"]
    goes(run, clock, steps=9)
    assert view.facts() == ["19%", "50 tokens/s", "0.5 steps/s", "4:03 left"]


def test_work_during_a_task_counts(tmp_path: Path) -> None:
    clock, run = Clock(), a_run(tmp_path)
    view = View(run, [], clock)
    view.start_training()
    for step in range(12):
        view.follow("uploading", step, 100)
        goes(run, clock, seconds=2.0)
    assert view.facts() == ["12%", "50 tokens/s", "0.5 steps/s", "2:56 left"]


def test_a_run_that_goes_back_has_a_speed_soon_and_never_a_negative_one(tmp_path: Path) -> None:
    clock, run = Clock(), a_run(tmp_path)
    pace = Pace(run, clock)
    for _ in range(5):
        goes(run, clock)
        pace.look()
    run.progress.step = 2
    pace.look()
    assert (pace.speeds(), pace.left()) == ([], "")
    goes(run, clock)
    pace.look()
    assert (pace.speeds()[1], pace.left()) == ("0.5 steps/s", "3:14")


@plugin
class Follows:
    """Looks at a run whose steps take two seconds each, and whose validations take eight."""

    stops: int = 10**9
    seen: list[tuple[int, str]] = field(init=False, factory=list)
    clock: Any = field(init=False, factory=Clock)
    view: Any = field(init=False, default=None)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self.view = View(run, [], self.clock)
        self.view.start_training()

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        self.clock.now += 2.0
        facts = self.view.facts()
        self.seen += [(run.progress.step, facts[-1])] if facts[-1].endswith("left") else []
        if run.progress.step == self.stops:
            run.stop("enough")

    @hookimpl
    def on_progress(self, run: Run, task: str, done: int, total: int | None) -> None:
        if task == "validation" and self.view is not None:
            self.view.follow(task, done, total)
            self.clock.now += 8.0 if done == 1 else 0.0


@pytest.mark.parametrize("length", ["40 steps", "160 tokens", "10 epochs"])
def test_a_resumed_run_shows_the_time_left_from_its_second_step(
    length: str, tiny_run: TinyRun
) -> None:
    settings: dict[str, Any] = {"length": length, "validate_every": 5, "settings": {}}
    tiny_run("checkpoint", Follows(stops=20), **settings)
    follows = Follows()
    run = tiny_run("checkpoint", follows, **settings)
    assert run.progress.step == 40
    assert follows.seen[0] == (22, "0:36 left")
    assert follows.seen[3] == (25, "0:30 left")
    assert follows.seen[4][1] != "0:28 left", "the first validation predicts the others"


# Tasks.


def tasks(view: View) -> list[str]:
    return ["".join(text for text, _ in row).split()[0] for row in view.rows(100)]


def test_a_task_without_an_end_is_gone_a_step_later(tmp_path: Path) -> None:
    clock, run = Clock(), a_run(tmp_path)
    view = View(run, [], clock)
    view.start_training()
    goes(run, clock)
    view.follow("saving", 3, 10)
    goes(run, clock)
    assert tasks(view) == ["step", "saving"]
    goes(run, clock)
    assert tasks(view) == ["step"]
    view.follow("validation", 3, None)
    view.end_validation()
    assert tasks(view) == ["step"]


def test_the_bar_of_a_task_without_an_end_moves(tmp_path: Path) -> None:
    clock = Clock()
    view = View(a_run(tmp_path), [], clock)
    view.follow("compiling", 0, None)
    (first,) = view.rows(60)
    clock.now += 21
    (then,) = view.rows(60)
    assert "".join(text for text, _ in first) == "  compiling ━━━━──────────────────── 0:00"
    assert "".join(text for text, _ in then) == "  compiling ━━━━──────────────────── 0:21"
    clock.now += 1
    (then,) = view.rows(60)
    assert "".join(text for text, _ in then) == "  compiling ─━━━━─────────────────── 0:22"


ALL = "loss 3.242  val/loss 3.31  lr 0.0005  50 tokens/s  0.5 steps/s  0:40 left"
BY_WIDTH = {
    120: f"step 20/40 ━━━━━━━━━━━━──────────── 50%  {ALL}",
    97: f"step 20/40 ━━─── 50%  {ALL}",
    90: "step 20/40 ━━━━──── 50%  loss 3.242  val/loss 3.31  lr 0.0005  50 tokens/s  0:40 left",
    77: "step 20/40 ━━━━──── 50%  loss 3.242  val/loss 3.31  50 tokens/s  0:40 left",
    59: "step 20/40 ━━─── 50%  loss 3.242  val/loss 3.31  0:40 left",
    37: "step 20/40 50%  loss 3.242  0:40 left",
    30: "step 20/40 50%  0:40 left",
    7: "step 20",
}


@pytest.mark.parametrize("width", BY_WIDTH)
def test_a_narrow_bar_shows_the_most_important_parts(width: int, tmp_path: Path) -> None:
    clock, run = Clock(), a_run(tmp_path, 40)
    view = View(run, ["train/loss", "val/loss", "optim/lr"], clock)
    view.start_training()
    goes(run, clock, steps=20)
    view.keep_metrics({"train/loss": 3.242, "val/loss": 3.31, "optim/lr": 0.0005})
    assert "".join(text for text, _ in view.rows(width)[0]) == BY_WIDTH[width]


@settings(deadline=None)
@given(st.integers(0, 200), st.lists(st.text("ab/", min_size=1), max_size=4), st.integers(0, 50))
def test_no_row_is_wider_than_it_may_be(width: int, names: list[str], done: int) -> None:
    from pathlib import Path

    clock = Clock()
    run = a_run(Path(), 10**6)
    view = View(run, names, clock)
    view.start_training()
    goes(run, clock, steps=20)
    view.keep_metrics(dict.fromkeys(names, 1234.5))
    for name in names:
        view.follow(name, done, 51)
    for row in view.rows(width):
        assert sum(len(text) for text, _ in row) <= width


# What a bar costs.


class Screen(io.StringIO):
    """A terminal that counts."""

    def isatty(self) -> bool:
        return True

    @property
    def pictures(self) -> int:
        return self.getvalue().count(BEGIN)


def test_a_bar_is_redrawn_only_if_something_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fundamentallm_progress.bar.SECONDS", 1000.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    run = a_run(tmp_path, 10**6)
    bar = Bar(run, ["train/loss"])
    bar.start_training()
    opened = screen.pictures
    for step in range(10_000):
        run.progress.step = step
        bar.show_task("validation", step % 10, 10)
        bar.show_metrics({"train/loss": float(step)}, validated=False)
    assert screen.pictures == opened, "neither a report nor a row draws"
    size = len(screen.getvalue())
    bar.refresh()
    assert screen.pictures == opened + 1
    assert len(screen.getvalue()) - size < 1000
    bar.show_task("validation", 10, 10)
    bar.refresh()
    for _ in range(100):
        bar.refresh()
    assert screen.pictures == opened + 2, "nothing has changed any more"
    for line in range(7):
        print(line, file=sys.stderr)
    assert screen.pictures == opened + 9, "each line moves the bar down, once"
    bar.close()
    assert screen.pictures <= opened + 11


# In a notebook.


class Area:
    """What a notebook shows, in place of a kernel that would send it."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, data: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.shown.append(data["text/plain"])


@pytest.fixture
def areas(monkeypatch: pytest.MonkeyPatch) -> list[Area]:
    """The areas that are shown, in a process that a notebook's kernel is said to be."""
    found: list[Area] = []

    def display(data: dict[str, str], *, raw: bool, display_id: bool) -> Area:
        assert (data, raw, display_id) == ({"text/plain": ""}, True, True)
        found.append(Area())
        return found[-1]

    ipython, shown = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    vars(ipython)["get_ipython"] = lambda: types.SimpleNamespace(kernel=object())
    vars(shown)["display"] = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    return found


def test_a_notebook_has_one_area_that_changes_and_no_lines(
    tiny_run: TinyRun, areas: list[Area], capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run(Progress(), Works(), length=200, log_every=1, validate_every=50)
    assert capsys.readouterr().err == ""
    (area,) = areas
    assert len(area.shown) < 20
    assert re.fullmatch(
        r"step 200/200 ━+ 100%  loss 0\.\d+  val/loss 0\.\d+  lr 0\.01  .*steps/s", area.shown[-1]
    )


def test_a_notebook_output_is_updated_only_if_its_text_has_changed(
    tmp_path: Path, areas: list[Area], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fundamentallm_progress.notebook._SECONDS", 1000.0)
    run = a_run(tmp_path, 10**6)
    notebook = Notebook(run, ["train/loss"])
    notebook.start_training()
    for step in range(1000):
        run.progress.step = step
        notebook.show_metrics({"train/loss": float(step)}, validated=False)
    for _ in range(3):
        notebook.refresh()
    (area,) = areas
    (text,) = area.shown
    assert text.startswith("step 999/1,000,000 ")


def test_samples_count_where_there_are_no_tokens(tmp_path: Path) -> None:
    now = [0.0]
    run = a_run(tmp_path)
    pace = Pace(run, lambda: now[0])
    now[0], run.progress.step, run.progress.samples = 2.0, 1, 3000
    pace.look()
    now[0], run.progress.step, run.progress.samples = 4.0, 2, 6000
    pace.look()
    now[0], run.progress.step, run.progress.samples = 6.0, 3, 9000
    pace.look()
    assert pace.speeds() == ["1.5k samples/s", "0.5 steps/s"]


def test_the_shown_speed_follows_a_change_of_the_speed(tmp_path: Path) -> None:
    now = [0.0]
    run = a_run(tmp_path, 10**6)
    pace = Pace(run, lambda: now[0])
    for tokens in [1] * 100 + [1000] * 100:
        now[0] += 1.0
        run.progress.step += 1
        run.progress.samples += 1
        run.progress.tokens += tokens
        pace.look()
    assert pace.speeds() == ["1k tokens/s", "1 steps/s"]


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
