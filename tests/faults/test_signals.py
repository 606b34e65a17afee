"""A signal costs no step: the run is saved where it stops, says how to go on, and ends the same."""

from __future__ import annotations

import random
import re
import signal
import time
from functools import partial

import layer
import pytest
import tiny
from tiny import EVERY, SIGNALS


@pytest.fixture(scope="session")
def validated(tmp_path_factory):
    """An uninterrupted run that spends most of its time in validations."""
    folder = tmp_path_factory.mktemp("validated")
    settings = tiny.write_settings(folder, text={"validation_batches": 40})
    tiny.end(tiny.start("train", settings, "--run-dir", folder / "run"))
    return settings, tiny.digest(folder / "run"), tiny.rows(folder / "run")


def check(folder, started, number, whole):
    """See that a signal ended the run without losing a step, and what a resumed run comes to."""
    code, said = started.wait(), started.said
    settings, digest, rows = whole
    if code == 0:  # the run was over before
        assert tiny.digest(folder) == digest
        return 0
    assert code == SIGNALS[number], said
    assert "Traceback" not in said
    stopped = re.search(r"interrupted after (\d+) steps", said)
    if not (folder / "settings.toml").exists():  # nothing was built yet
        words = ["train", settings, "--run-dir", folder]
    else:
        assert f"fundamentallm resume {folder}" in said
        words = ["resume", folder]
    if stopped and int(stopped[1]):
        assert tiny.steps(folder)[-1] == int(stopped[1]) >= tiny.reached(folder)
    assert tiny.unsound(folder) == []
    assert not list(folder.glob("checkpoints/.*"))
    tiny.end(tiny.start(*words))
    assert tiny.digest(folder) == digest
    assert tiny.rows(folder) == rows
    return code


def check_moment(seed, validated, folder):
    chance = random.Random(seed)
    number, after = chance.choice([*SIGNALS]), chance.randrange(tiny.LAST)
    started = tiny.start("train", validated[0], "--run-dir", folder)
    tiny.wait_for(lambda: tiny.reached(folder) >= after, started)
    time.sleep(chance.random() * 0.05)
    started.send(number)
    check(folder, started, number, validated)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_the_middle_of_a_save_loses_no_step(number, uninterrupted, tmp_path):
    before = partial(layer.signal_in_save, 2 * EVERY, number, 10)
    words = ["train", uninterrupted.settings, "--run-dir", tmp_path / "run"]
    whole = (uninterrupted.settings, uninterrupted.digest, uninterrupted.rows)
    started = tiny.start(*words, before=before)
    assert check(tmp_path / "run", started, number, whole) == SIGNALS[number]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_during_a_validation_ends_the_run_at_that_step(number, validated, tmp_path):
    folder = tmp_path / "run"
    started = tiny.start("train", validated[0], "--run-dir", folder)
    # The row of a step that is validated comes after the validation.
    assert tiny.wait_for(lambda: tiny.reached(folder) == 11, started)
    time.sleep(0.02)
    started.send(number)
    assert check(folder, started, number, validated) == SIGNALS[number]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_a_signal_at_a_random_moment_loses_no_step(seed, validated, tmp_path):
    check_moment(seed, validated, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("after", range(1, 80, 4))
def test_a_signal_at_a_system_call_of_a_save_loses_no_step(after, uninterrupted, tmp_path):
    number = [*SIGNALS][after % 3]
    before = partial(layer.signal_in_save, 3 * EVERY, number, after)
    words = ["train", uninterrupted.settings, "--run-dir", tmp_path / "run"]
    whole = (uninterrupted.settings, uninterrupted.digest, uninterrupted.rows)
    assert check(tmp_path / "run", tiny.start(*words, before=before), number, whole)


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
