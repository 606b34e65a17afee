"""``train.log`` has all lines; the terminal has those that no other plugin shows."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fundamentallm import hookimpl, plugin
from fundamentallm.testing import PluginContract, TinyRun
from fundamentallm_console import Console

if TYPE_CHECKING:
    from pathlib import Path

    from fundamentallm import Run


class TestContract(PluginContract):
    plugin = Console


def lines(folder: Path) -> list[str]:
    """Return the lines of the log, without time and level."""
    text = (folder / "train.log").read_text()
    form = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ +")
    assert all(form.match(line) for line in text.splitlines()), text
    return [form.sub("", line) for line in text.splitlines()]


@plugin
class Saver:
    """Announces a checkpoint, as a plugin does that saves one."""

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        if run.progress.step == 3:
            run.hook.on_checkpoint_saved(run=run, folder=run.folder / "step-3")


def test_the_log_has_start_rows_validations_checkpoints_and_end(tiny_run: TinyRun) -> None:
    run = tiny_run(Console(), Saver(), length=4, validate_every=2)
    found = [re.sub(r"\d\.\d+", "#", line) for line in lines(run.folder)]
    assert found == [
        "run run starts: 161 parameters on cpu, for 4 steps, seed 1337",
        "plugins: console, saver, tiny_data, tiny_model, tiny_optimizer",
        "step 2: validation: val/loss #",
        "step 2: train/loss #, optim/lr #, train/tokens 8",
        f"saved {run.folder / 'step-3'}",
        "step 4: validation: val/loss #",
        "step 4: train/loss #, optim/lr #, train/tokens 16",
        "finished at step 4, after # s of training and 16 tokens",
    ]


def test_a_row_shows_the_metrics_that_were_asked_for(tiny_run: TinyRun) -> None:
    run = tiny_run(Console(metrics=["optim/*", "no/such"]), length=2)
    assert "step 2: optim/lr 0.01" in lines(run.folder)
    quiet = tiny_run(Console(metrics=[]), length=2, run_dir=run.folder / "quiet")
    assert not [line for line in lines(quiet.folder) if "train/" in line]


def test_a_second_run_in_the_folder_appends(tiny_run: TinyRun) -> None:
    for _ in range(2):
        run = tiny_run(Console(), length=2)
    assert sum(line.startswith("run run starts") for line in lines(run.folder)) == 2


def test_warnings_of_anyone_are_in_the_log(tiny_run: TinyRun) -> None:
    @plugin
    class Warns:
        @hookimpl
        def on_step_end(self) -> None:
            logging.getLogger("fundamentallm").warning("mind the gap")

    run = tiny_run(Console(), Warns(), length=1)
    assert "WARNING mind the gap" in (run.folder / "train.log").read_text()


def test_the_log_says_why_a_run_stopped(tiny_run: TinyRun) -> None:
    @plugin
    class Stops:
        @hookimpl
        def on_step_end(self, run: Run) -> None:
            run.stop("enough")

    run = tiny_run(Console(), Stops(), length=9)
    assert lines(run.folder)[-1].startswith("stopped (enough) at step 1, after")


@pytest.mark.parametrize(
    ("hook", "text"),
    [
        ("on_step_end", "failed at step 1, after"),
        ("build_model", "failed while starting, before any step"),
    ],
)
def test_the_log_says_how_a_run_failed_and_the_terminal_shows_no_traceback(
    hook: str,
    text: str,
    tiny_run: TinyRun,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(self: object) -> None:
        raise ZeroDivisionError("one by nought")

    Fails = plugin(type("Fails", (), {hook: hookimpl(fail)}))
    with pytest.raises(Exception, match="one by nought"):
        tiny_run(Console(), Fails(), length=9)
    log = (tmp_path / "run" / "train.log").read_text()
    end, _, after = log.partition(" ERROR ")
    assert text in end.splitlines()[-2]
    first, *trace = after.splitlines()
    assert first.strip().startswith("PluginError: ")
    assert "one by nought" in first
    assert trace[0] == "Traceback (most recent call last):"
    assert "ZeroDivisionError: one by nought" in trace
    line = f'  File "{__file__}", line {fail.__code__.co_firstlineno + 1}, in fail'
    assert [text for text in trace if text.startswith(line)] == [line]
    assert "The above exception was the direct cause of the following exception:" in trace
    assert "Traceback" not in caplog.text + "".join(capsys.readouterr())


def test_the_handlers_and_level_of_logging_are_restored_at_the_end(tiny_run: TinyRun) -> None:
    logger = logging.getLogger("fundamentallm")
    before = logger.level, list(logger.handlers)
    tiny_run(Console(), length=2)
    assert (logger.level, logger.handlers) == before


def test_a_file_that_cannot_be_written_is_a_warning_and_not_the_end(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run" / "train.log").mkdir(parents=True)
    assert tiny_run(Console(), length=2).outcome == "finished"
    assert "console failed and is muted" in caplog.text


def test_a_disk_that_fills_up_is_reported_once(
    tiny_run: TinyRun,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.log").symlink_to("/dev/full")
    assert tiny_run(Console(), length=8).outcome == "finished"
    assert caplog.text.count("train.log is not written any more: [Errno 28]") == 1
    assert "Traceback" not in capsys.readouterr().err


PROGRAM = """
import logging, sys
from pathlib import Path
from fundamentallm import hookimpl, plugin, train
from fundamentallm.testing import compose_tiny
from fundamentallm_console import Console

@plugin
class Shows:
    @hookimpl
    def on_progress(self, task, done, total):
        pass

def run(name, *more):
    composed = compose_tiny(Console(), *more, length=2, validate_every=2)
    train(composed, run_dir=Path(sys.argv[1]) / name)
    logging.getLogger("fundamentallm").warning("after %s", name)

run("bare")
logging.basicConfig(level=logging.INFO, format="%(message)s")
run("set_up")
run("shown", Shows())
"""
ROW = "step 2: train/loss #, optim/lr #, train/tokens 8"


def test_the_terminal_shows_each_line_once_and_rows_unless_another_plugin_shows_the_progress(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert not done.stdout
    shown = [re.sub(r"\d\.\d+", "#", line) for line in done.stderr.splitlines()]
    expected = []
    for name, more in {"bare": "", "set_up": "", "shown": ", shows"}.items():
        if name != "bare":  # logging is set up, so the core's own lines are shown, too
            expected += [
                f"training for 2 steps in {tmp_path / name}",
                "nothing will be saved: no listed plugin saves checkpoints",
            ]
        expected += [
            f"run {name} starts: 161 parameters on cpu, for 2 steps, seed 1337",
            f"plugins: console{more}, tiny_data, tiny_model, tiny_optimizer",
            "step 2: validation: val/loss #",
            *([] if more else [ROW]),
            "finished at step 2, after # s of training and 8 tokens",
            f"after {name}",
        ]
    assert shown == expected
    assert ROW in [re.sub(r"\d\.\d+", "#", line) for line in lines(tmp_path / "shown")]
