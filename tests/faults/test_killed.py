"""A run that is killed at any moment and resumed ends with the bits of one that never was."""

from __future__ import annotations

import random
import signal
import time
from functools import partial

import layer
import pytest
import tiny
from tiny import EVERY

CALLS = 600
"""Somewhat more system calls than all saves of an uninterrupted run make."""


def check(folder, asynchronous=True):
    """See that a killed run has lost no more than is said, and nothing half is taken for whole."""
    assert tiny.unsound(folder) == []
    newest, reached = tiny.steps(folder)[-1:] or [0], tiny.reached(folder)
    # Beside the steps one save may be under way: it was begun before the period that is not over.
    lost = 2 * EVERY if asynchronous else EVERY
    assert newest[0] > reached - lost - 1, (newest, reached)


def finish(folder, uninterrupted):
    tiny.end(tiny.resume(folder) if (folder / "settings.toml").exists()
             else tiny.start("train", uninterrupted.settings, "--run-dir", folder))  # fmt: skip
    assert tiny.digest(folder) == uninterrupted.digest
    assert tiny.rows(folder) == uninterrupted.rows
    assert not list(folder.glob("checkpoints/.*"))


def killed_once(folder, uninterrupted, kill):
    """Start or go on, be killed by what ``kill`` does before or after the start."""
    begun = (folder / "settings.toml").exists()
    words = ["resume", folder] if begun else ["train", uninterrupted.settings, "--run-dir", folder]
    if callable(kill):
        started = tiny.start(*words, before=kill)
    else:
        started = tiny.start(*words)
        until, delay = kill
        tiny.wait_for(lambda: until(folder), started)
        time.sleep(delay)
        started.send(signal.SIGKILL)
    code = started.wait()
    assert code in (0, -signal.SIGKILL), started.said
    check(folder)
    return code == 0


def saving(folder):
    return any(folder.glob("checkpoints/.tmp-0*"))


def moment(seed):
    """Draw how a run is killed: at a time, while it saves, or at a system call of its saves."""
    chance = random.Random(seed)
    kind = chance.choice(["time", "save", "call", "torn", "rename"])
    after = chance.randrange(tiny.LAST)
    return {
        "time": (lambda folder: tiny.reached(folder) >= after, chance.random() * 0.02),
        "save": (saving, chance.random() * 0.01),
        "call": partial(layer.kill_at, chance.randrange(1, CALLS)),
        "torn": partial(layer.kill_at, chance.randrange(1, CALLS), torn=True),
        "rename": partial(layer.kill_at_renames, chance.randrange(1, 8)),
    }[kind]


def kill_again_and_again(folder, uninterrupted, seeds):
    over = False
    for seed in seeds:
        over = over or killed_once(folder, uninterrupted, moment(seed))
    finish(folder, uninterrupted)


def test_a_run_killed_again_and_again_ends_with_the_same_bits(uninterrupted, tmp_path):
    kill_again_and_again(tmp_path / "run", uninterrupted, ["a1", "a2", "a3", "a4"])


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_killed_before_a_checkpoint_has_its_name_goes_on_from_the_one_before(
    number, uninterrupted, tmp_path
):
    killed_once(tmp_path / "run", uninterrupted, partial(layer.kill_at_renames, number + 1))
    assert tiny.steps(tmp_path / "run") == [EVERY * n for n in range(1, number + 1)]
    assert len(list((tmp_path / "run").glob("checkpoints/.tmp-*"))) == 1
    finish(tmp_path / "run", uninterrupted)


def test_a_run_that_waits_for_its_saves_loses_at_most_one_period(uninterrupted, tmp_path):
    folder, waits = tmp_path / "run", ["--set", "checkpoint.asynchronous=false"]
    started = tiny.start("train", uninterrupted.settings, "--run-dir", folder, *waits)
    tiny.wait_for(lambda: tiny.reached(folder) >= EVERY * 3 - 1, started)
    started.send(signal.SIGKILL)
    started.wait()
    check(folder, asynchronous=False)
    finish(folder, uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(100))
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(seed, uninterrupted, tmp_path):
    kill_again_and_again(tmp_path / "run", uninterrupted, [seed])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(20))
def test_a_run_killed_five_times_ends_with_the_same_bits(seed, uninterrupted, tmp_path):
    kill_again_and_again(tmp_path / "run", uninterrupted, [f"{seed}/{n}" for n in range(5)])
