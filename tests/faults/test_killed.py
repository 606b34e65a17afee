"""A run that is killed at any moment and resumed ends with the bits of one that never was."""

from __future__ import annotations

import signal
import time
from functools import partial

import layer
import pytest
import tiny
from draws import SEEN, AfterStep, WhileSaving, act_at, often
from hypothesis import strategies as st
from tiny import EVERY, SAVES

MOMENTS = {**SEEN, **act_at(st.just(layer.kill), torn=st.booleans())}
# Most of them in saves and where names are given.
COUNTS = {
    "any time": 40,
    "while it saves": 40,
    "a system call of a save": 50,
    "a name given or taken": 40,
    "a call of the start": 5,
    "a hook": 15,
    "a validation": 5,
    "a task": 5,
}
WAITS = ("--set", "checkpoint.asynchronous=false")


def begun(folder):
    """Return the last step whose save was begun for certain: its folder is there, or the row of a
    later step is, which is written after the save was."""
    made = [int(path.name.split("-")[1]) for path in folder.glob("checkpoints/.tmp-0*")]
    later = [step for step in SAVES if step < tiny.reached(folder)]
    return max([0, *made, *later])


def check(folder, waits=False):
    """See that a killed run has lost no more than is said, and nothing half is taken for whole.

    The newest checkpoint is the one whose save was begun last, or the one before: at most one save
    is under way. If it was waited for, it is the last before the last row.
    """
    assert tiny.unsound(folder) == []
    newest, last, reached = max([0, *tiny.steps(folder)]), begun(folder), tiny.reached(folder)
    assert newest >= max([0, *(step for step in SAVES if step < last)]), (newest, last, reached)
    if waits:
        assert newest >= max([0, *(step for step in SAVES if step < reached)]), (newest, reached)
        assert newest >= reached - EVERY
    assert newest >= reached - 2 * EVERY


def finish(folder, uninterrupted):
    tiny.end(
        tiny.resume(folder)
        if (folder / "settings.toml").exists()
        else tiny.start("train", uninterrupted.settings, "--run-dir", folder)
    )
    assert tiny.digest(folder) == uninterrupted.digest
    assert tiny.rows(folder) == uninterrupted.rows
    assert not list(folder.glob("checkpoints/.*"))


def killed(folder, uninterrupted, moment, *words):
    """Start or go on, and be killed at a moment; False if the run was over before."""
    started_before = (folder / "settings.toml").exists()
    run = (
        ["resume", folder]
        if started_before
        else ["train", uninterrupted.settings, "--run-dir", folder]
    )
    if isinstance(moment, partial):
        started = tiny.start(*run, *words, before=moment)
    else:
        started = tiny.start(*run, *words)
        tiny.wait_for(partial(seen, folder, moment), started)
        time.sleep(moment.delay)
        started.send(signal.SIGKILL)
    code = started.wait()
    assert code in (0, -signal.SIGKILL), started.said
    check(folder, waits=words == WAITS)
    return code != 0


def seen(folder, moment):
    if isinstance(moment, AfterStep):
        return tiny.reached(folder) >= moment.step
    return any(folder.glob(f"checkpoints/.tmp-{moment.step:08d}-*"))


def killed_and_resumed(uninterrupted, moments, folder, words=()):
    """Be killed at all these moments; True if it was at one of them, and is the same run then."""
    were = [killed(folder, uninterrupted, moment, *words) for moment in moments]
    if not any(were):
        return False
    finish(folder, uninterrupted)
    return True


def test_a_run_killed_again_and_again_ends_with_the_same_bits(uninterrupted, tmp_path):
    moments = [
        AfterStep(EVERY + 3, 0.001),
        partial(layer.act_in_save, layer.kill, 2 * EVERY, 40, torn=True),
        WhileSaving(4 * EVERY, 0.002),
        partial(layer.act_at_rename, layer.kill, 3, 1),  # the third of this process
        partial(layer.act_at_hook, layer.kill, "validate", tiny.LAST),
    ]
    were = [killed(tmp_path / "run", uninterrupted, moment) for moment in moments]
    assert were == [True] * len(moments)
    finish(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_killed_before_a_checkpoint_has_its_name_goes_on_from_the_one_before(
    number, uninterrupted, tmp_path
):
    # The first thing that gets its name is the run itself.
    before_name = partial(layer.act_at_rename, layer.kill, number + 2)
    assert killed(tmp_path / "run", uninterrupted, before_name)
    assert tiny.steps(tmp_path / "run") == [EVERY * n for n in range(1, number + 1)]
    assert len(list((tmp_path / "run").glob("checkpoints/.tmp-*"))) == 1
    finish(tmp_path / "run", uninterrupted)


def test_a_run_that_waits_for_its_saves_loses_at_most_one_period(uninterrupted, tmp_path):
    moment = AfterStep(EVERY * 3 - 1, 0.0)
    assert killed_and_resumed(uninterrupted, [moment], tmp_path / "run", WAITS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", MOMENTS)
def test_a_run_killed_at_a_random_moment_ends_with_the_same_bits(kind, uninterrupted, tmp_path):
    moments = MOMENTS[kind].map(lambda moment: [moment])
    often(COUNTS[kind], moments, partial(killed_and_resumed, uninterrupted), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_up_to_five_times_ends_with_the_same_bits(uninterrupted, tmp_path):
    moments = st.lists(st.one_of(*MOMENTS.values()), min_size=2, max_size=5)
    often(20, moments, partial(killed_and_resumed, uninterrupted), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wherever_it_is_killed_a_run_that_waits_for_its_saves_loses_at_most_one_period(
    uninterrupted, tmp_path
):
    moments = st.one_of(*MOMENTS.values()).map(lambda moment: [moment])
    check_one = partial(killed_and_resumed, uninterrupted, words=WAITS)
    often(20, moments, check_one, tmp_path)
