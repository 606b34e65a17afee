"""A signal costs no step: the run is saved where it stops, prints how to resume, ends the same."""

from __future__ import annotations

import re
import signal
import time
from functools import partial

import layer
import pytest
import tiny
from draws import SEEN, act_at, often
from hypothesis import strategies as st
from test_killed import seen
from tiny import EVERY, SIGNALS


@pytest.fixture(scope="session")
def validated(tmp_path_factory):
    """An uninterrupted run that spends most of its time in validations."""
    folder = tmp_path_factory.mktemp("validated")
    settings = tiny.write_settings(folder, text={"validation_batches": 40})
    tiny.end(tiny.start("train", settings, "--run-dir", folder / "run"))
    return settings, tiny.digest(folder / "run"), tiny.rows(folder / "run")


def check(folder, started, number, whole):
    """See that a signal ended the run without losing a step, and what a resumed run comes to;
    return the step that it stopped at, None if the run was over before."""
    code, said = started.wait(), started.said
    settings, digest, rows = whole
    if code == 0:
        assert tiny.digest(folder) == digest
        return None
    assert code == SIGNALS[number], said
    assert "Traceback" not in said
    assert "validated on" not in said  # the grace is a step, not the rest of a validation
    stopped = int(re.search(r"interrupted after (\d+) steps", said)[1])
    in_step = re.search(r"signalled in step ([\d.]+)", said)
    if in_step:  # the step that was under way is made to its end, or the next one if none was
        assert float(in_step[1]) <= stopped <= float(in_step[1]) + 1
    if not (folder / "settings.toml").exists():  # nothing was built yet
        words = ["train", settings, "--run-dir", folder]
    else:
        assert f"fundamentallm resume {folder}" in said
        words = ["resume", folder]
    if stopped:
        assert tiny.steps(folder)[-1] == stopped >= tiny.reached(folder)
    assert tiny.unsound(folder) == []
    assert not list(folder.glob("checkpoints/.*"))
    tiny.end(tiny.start(*words))
    assert tiny.digest(folder) == digest
    assert tiny.rows(folder) == rows
    return stopped


def signalled(whole, drawn, folder):
    """Have a run ended by a signal at a moment and see that nothing is lost; False if the run was
    over before."""
    number, moment = drawn
    words = ["train", whole[0], "--run-dir", folder]
    if isinstance(moment, partial):
        # With a cache of its own it has text to read.
        words += ["--set", f'text.cache_dir="{folder}.cache"']
        started = tiny.start(*words, before=partial(moment, act=partial(layer.send, number)))
        return check(folder, started, number, whole) is not None
    started = tiny.start(*words, before=layer.prepared)
    tiny.wait_for(partial(seen, folder, moment), started)
    time.sleep(moment.delay)
    started.send(number)
    reached = tiny.reached(folder)
    stopped = check(folder, started, number, whole)
    # Where its row had yet to be written, one step was under way, and the next may have begun.
    assert stopped is None or reached <= stopped <= reached + 2
    return stopped is not None


@pytest.fixture(scope="session")
def whole(uninterrupted):
    return uninterrupted.settings, uninterrupted.digest, uninterrupted.rows


MOMENTS = {**SEEN, **act_at(st.none())}
COUNTS = {
    "any time": 15,
    "while it saves": 5,
    "a system call of a save": 10,
    "a name given or taken": 4,
    "a hook": 14,
    "a validation": 12,
    "a task": 10,
    "a call of the start": 2,
}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_the_middle_of_a_save_loses_no_step(number, whole, tmp_path):
    moment = partial(layer.act_in_save, step=2 * EVERY, number=10)
    assert signalled(whole, (number, moment), tmp_path / "run")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_during_a_validation_ends_the_run_at_that_step(number, validated, tmp_path):
    moment = partial(layer.act_at_hook, partial(layer.send, number), "forward", 7, validating=True)
    words = ["train", validated[0], "--run-dir", tmp_path / "run"]
    assert check(tmp_path / "run", tiny.start(*words, before=moment), number, validated) == 12


@pytest.mark.parametrize(
    ("number", "task"),
    [*zip(SIGNALS, ("reading the alphabet", "tokenizing", "validation"), strict=True)],
)
def test_a_signal_during_a_task_loses_nothing(number, task, whole, tmp_path):
    moment = partial(layer.act_at_task, task=task, count=1)
    assert signalled(whole, (number, moment), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", MOMENTS)
def test_a_signal_at_a_random_moment_loses_no_step(kind, whole, validated, tmp_path):
    drawn = st.tuples(st.sampled_from([*SIGNALS]), MOMENTS[kind])
    often(COUNTS[kind], drawn, partial(signalled, validated if kind in SEEN else whole), tmp_path)


def test_signals_before_during_and_after_the_start_lose_nothing(validated, tmp_path):
    folder = tmp_path / "run"
    for number, delay in zip(SIGNALS, (0.05, 0.2, 0.35), strict=True):
        begun = (folder / "settings.toml").exists()
        words = ["resume", folder] if begun else ["train", validated[0], "--run-dir", folder]
        started = tiny.start(*words)
        # Before the command listens, a signal does what it does to any process.
        tiny.wait_for((folder / ".lock").exists, started)
        time.sleep(delay)
        started.send(number)
        assert started.wait() in (0, SIGNALS[number], -number)
        assert tiny.unsound(folder) == []
    tiny.end(tiny.start("train", validated[0], "--run-dir", folder))
    assert tiny.digest(folder) == validated[1]


SLOW = '''
import time
from fundamentallm import hookimpl, plugin

@plugin
class Slow:
    """Takes its time with every step."""

    @hookimpl
    def on_step_start(self):
        time.sleep(0.08)
'''


def test_a_run_that_is_cut_into_pieces_by_its_time_limit_ends_with_the_same_bits(
    uninterrupted, tmp_path
):
    (tmp_path / "slow.py").write_text(SLOW)
    settings = tiny.write_settings(tmp_path, run={"max_time": "1 seconds"})
    settings.write_text(settings.read_text().replace('"checkpoint",', '"checkpoint", "./slow.py",'))
    folder, pieces = tmp_path / "run", []
    started = tiny.start("train", settings, "--run-dir", folder)
    while (code := started.wait()) == SIGNALS[signal.SIGUSR1]:
        pieces.append(tiny.steps(folder)[-1:])
        stopped = re.search(r"interrupted after (\d+) steps", started.said)
        assert stopped
        assert pieces[-1] == ([int(stopped[1])] if int(stopped[1]) else [])
        assert len(pieces) < 40
        started = tiny.start("train", settings, "--run-dir", folder)
    assert code == 0, started.said
    assert len(pieces) >= 2
    assert tiny.digest(folder) == uninterrupted.digest
    assert tiny.rows(folder) == uninterrupted.rows
