"""A refused save leaves the earlier checkpoints, and the run ends or continues as it is set."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import threading
from functools import partial

import layer
import mounts
import pytest
import tiny
from draws import START
from tiny import EVERY

SAVED = 4 * EVERY
"""The step whose save goes wrong: the first that deletes a checkpoint after."""
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
CALLS, RENAME = 77, 66
"""The system calls of such a save, with those that delete, and which gives it its name: a test
counts them."""


def start(folder, uninterrupted, fault, on_save_error="stop"):
    """Train, or go on, with a fault in the saves."""
    begun = (folder / "settings.toml").exists()
    run = ["resume", folder] if begun else ["train", uninterrupted.settings, "--run-dir", folder]
    words = ["--set", f'checkpoint.on_save_error="{on_save_error}"']
    return tiny.start(*run, *words, before=fault)


def refusals(folder, said):
    """Return the steps that are said to be not saved, and why, the path being named."""
    assert "Traceback" not in said
    assert tiny.unsound(folder) == []
    failed = re.findall(r"checkpoint of step (\d+) could not be saved: (.+)\. Earlier", said)
    assert all(str(folder / "checkpoints") in why for _, why in failed), said
    return {int(step): why for step, why in failed}


def same(folder, uninterrupted):
    assert tiny.digest(folder) == uninterrupted.digest
    assert tiny.rows(folder) == uninterrupted.rows
    assert not list(folder.glob("checkpoints/.tmp-*"))
    return True


def ends(failed, on_save_error):
    """Whether a run ends where these saves are refused: one that may go on, only by its last."""
    return bool(failed) if on_save_error == "stop" else tiny.LAST in failed


def refused(folder, uninterrupted, fault, on_save_error="stop"):
    """Train with a fault; check that it is reported and then repaired. Return what was said."""
    started = start(folder, uninterrupted, fault, on_save_error)
    code, said = started.wait(), started.said
    failed = refusals(folder, said)
    assert code == (5 if ends(failed, on_save_error) else 0), said
    for step in failed if on_save_error == "stop" else []:
        # The save ran parallel to steps; its error was raised at a later one, before the next save.
        assert tiny.steps(folder)[-1] in (step - EVERY, *range(step, step + EVERY + 1))
        assert tiny.reached(folder) <= step + EVERY
    return code, failed, said


def check_stopping(folder, uninterrupted, number):
    """Refuse one call of a save with one error after the other; the run ends at each, and goes on
    in the end."""
    code = 0
    for error in ERRORS:
        if not code:  # start again
            shutil.rmtree(folder, ignore_errors=True)
        fault = partial(layer.refuse, number, {SAVED: error})
        code, failed, said = refused(folder, uninterrupted, fault)
        assert said.count("refused:") == 1, said
        assert failed.keys() == ({SAVED} if code else set())
        assert os.strerror(error) in (failed.get(SAVED) or said)
        assert failed or "could not be deleted" in said
        # All of it is on the disk before it has its name: who is refused after that, goes on from it.
        assert tiny.steps(folder)[-1] == (
            tiny.LAST if not code else SAVED - EVERY if number <= RENAME else SAVED
        )
        if code and number > RENAME:
            code = tiny.resume(folder).wait()
        assert code or same(folder, uninterrupted)
    if code:
        tiny.end(tiny.resume(folder))
    return same(folder, uninterrupted)


def check_going_on(folder, uninterrupted, number):
    """Refuse the same call of three saves, each with another error; the run goes on."""
    errors = dict(zip(range(SAVED, SAVED + 3 * EVERY, EVERY), ERRORS, strict=True))
    code, failed, said = refused(
        folder, uninterrupted, partial(layer.refuse, number, errors), "continue"
    )
    assert code == 0
    assert said.count("refused:") == 3, said
    for step, error in errors.items():
        assert os.strerror(error) in (failed.get(step) or said)
    assert len(failed) == 3 or "could not be deleted" in said
    return same(folder, uninterrupted)


BOTH = ["stop", pytest.param("continue", marks=pytest.mark.slow)]
CHECKS = {"stop": check_stopping, "continue": check_going_on}


@pytest.mark.parametrize(("on_save_error", "number"), [("continue", 24), ("stop", RENAME)])
def test_a_refused_call_of_a_save_is_reported_with_path_and_cause(
    on_save_error, number, uninterrupted, tmp_path
):
    assert CHECKS[on_save_error](tmp_path / "run", uninterrupted, number)


@pytest.mark.slow
@pytest.mark.parametrize("on_save_error", CHECKS)
@pytest.mark.parametrize("number", range(1, CALLS + 1))
def test_every_call_of_a_save_may_be_refused(number, on_save_error, uninterrupted, tmp_path):
    CHECKS[on_save_error](tmp_path / "run", uninterrupted, number)


def test_there_are_as_many_calls_as_are_refused(uninterrupted, tmp_path):
    before = partial(layer.record, tmp_path / "calls")
    tiny.end(start(tmp_path / "run", uninterrupted, before))
    calls = [call for call in pickle.loads((tmp_path / "calls").read_bytes()) if call[0] != "close"]
    first = next(n for n, call in enumerate(calls) if f".tmp-{SAVED:08d}" in call[1])
    after = next(n for n, call in enumerate(calls) if f".tmp-{SAVED + EVERY:08d}" in call[1])
    made = [call[0] for call in calls[first : after - 1]]  # the next one asks for room first
    made.remove("published")
    assert len(made) == CALLS
    assert made.index("rename") == RENAME - 1
    assert {"mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir"} <= {*made}


def test_a_disk_that_takes_a_part_of_every_write_gets_all_of_it(uninterrupted, tmp_path):
    tiny.end(start(tmp_path / "run", uninterrupted, layer.take_parts))
    assert tiny.unsound(tmp_path / "run") == []
    assert same(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    "number",
    [1, 14, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, START) if n != 14)],
)
def test_a_refused_call_of_the_start_is_reported_before_the_first_step(
    number, uninterrupted, tmp_path
):
    folder = tmp_path / "run"
    error = ERRORS[number % 3]
    started = start(folder, uninterrupted, partial(layer.refuse_at, number, error))
    code, said = started.wait(), started.said
    assert os.strerror(error) in said
    assert str(folder) in said
    assert "Traceback" not in said
    assert (code, tiny.reached(folder)) in ((5, 0), (0, tiny.LAST))
    assert code or "could not be deleted" in said
    if code:
        tiny.end(tiny.start("train", uninterrupted.settings, "--run-dir", folder))
    same(folder, uninterrupted)


def gone(folder, uninterrupted, fault, on_save_error):
    """Train on a disk that refuses from some moment on; go on once it takes files again."""
    code, failed, said = refused(folder, uninterrupted, fault, on_save_error)
    if not code and tiny.steps(folder)[-1] == tiny.LAST:
        return said
    assert failed
    assert tiny.steps(folder)
    tiny.end(start(folder, uninterrupted, None))
    same(folder, uninterrupted)
    return said


@pytest.mark.parametrize("on_save_error", BOTH)
@pytest.mark.parametrize(
    "call",
    [
        "write",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("rename", "unlink", "open", "fsync", "mkdir", "rmdir")
        ),
    ],
)
def test_a_disk_that_refuses_from_some_moment_on_leaves_what_was_saved(
    call, on_save_error, uninterrupted, tmp_path
):
    fault = partial(layer.gone_at, SAVED, errno.EROFS, call=call)
    assert "Read-only file system" in gone(tmp_path / "run", uninterrupted, fault, on_save_error)


@pytest.mark.parametrize("on_save_error", BOTH)
@pytest.mark.parametrize(
    "call",
    [
        "open",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("flock", "rename", "unlink", "rmdir")
        ),
    ],
)
def test_a_disk_that_is_mounted_read_only_leaves_what_was_saved(
    call, on_save_error, uninterrupted, tmp_path
):
    place = tmp_path / "run" / "checkpoints"
    said = gone(
        tmp_path / "run",
        uninterrupted,
        partial(mounts.read_only, place, SAVED, call),
        on_save_error,
    )
    assert "Read-only file system" in said
    assert ("mounted read-only: True" in said) == mounts.allowed()


@pytest.mark.parametrize("on_save_error", BOTH)
@pytest.mark.parametrize(
    "after", [9, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 14, 17, 22, 27))]
)
def test_a_run_folder_that_may_no_longer_be_written_leaves_what_was_saved(
    after, on_save_error, uninterrupted, tmp_path
):
    folder = tmp_path / "run"
    started = start(folder, uninterrupted, mounts.obey_permissions, on_save_error)
    assert tiny.wait_for(lambda: tiny.reached(folder) >= after, started)
    places = [folder, folder / "checkpoints"]
    for place in places:
        place.chmod(0o555)
    code, said = started.wait(), started.said
    for place in places:
        place.chmod(0o755)
    failed = refusals(folder, said)
    assert failed
    assert code == 5, said
    assert on_save_error == "stop" or tiny.LAST in failed
    assert all("Permission denied" in why for why in failed.values())
    assert on_save_error == "continue" or min(failed) <= tiny.reached(folder) + EVERY
    tiny.end(start(folder, uninterrupted, None))
    same(folder, uninterrupted)


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_disk_that_is_full_though_it_said_not_to_be(on_save_error, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    words = [
        "--run-dir",
        folder,
        "--set",
        f'checkpoint.on_save_error="{on_save_error}"',
        "--set",
        "checkpoint.keep_last=50",
    ]
    started = tiny.start(
        "train", uninterrupted.settings, *words, before=partial(layer.quota, 250_000)
    )
    code, said = started.wait(), started.said
    assert code == 5, said
    assert "No space left on device. Earlier checkpoints" in said
    assert ("It was the last of the run" in said) == (on_save_error == "continue")
    assert tiny.unsound(folder) == []
    assert tiny.steps(folder)
    assert not list(folder.glob("checkpoints/.*"))
    tiny.end(tiny.resume(folder))
    assert tiny.rows(folder) == uninterrupted.rows


@pytest.mark.parametrize("on_save_error", BOTH)
def test_a_disk_of_8_mb_that_fills_up(on_save_error, tmp_path):
    large = {"gpt": {"d_model": 64}, "checkpoint": {"every": 2, "keep_last": 50}}
    settings = tiny.write_settings(tmp_path / "large", **large)
    folder, copied = tmp_path / "disk", tmp_path / "copied"
    words = ["--run-dir", folder, "--set", f'checkpoint.on_save_error="{on_save_error}"']
    started = tiny.start(
        "train", settings, *words, before=partial(mounts.small_disk, folder, copied)
    )
    said = tiny.end(started, 5)
    assert ("It was the last of the run" in said) == (on_save_error == "continue")
    assert re.search(r"step \d+ could not be saved: .*No space left on device", said)
    assert tiny.unsound(copied) == []
    assert 0 < tiny.steps(copied)[-1] < tiny.LAST
    tiny.end(tiny.resume(copied))
    tiny.end(tiny.start("train", settings, "--run-dir", tmp_path / "whole"))
    assert tiny.digest(copied) == tiny.digest(tmp_path / "whole")


TARGETS = {
    "the checkpoints": lambda folder: folder / "checkpoints",
    "the run": lambda folder: folder,
    "what is being written": lambda folder: next(
        folder.glob("checkpoints/.tmp-*"), folder / "none"
    ),
}


@pytest.mark.parametrize(
    "number",
    [
        20,
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in (2, 3, 4, 5, 15, 16, 40, 65, 66, 67, 68, 69, 71, 75)
        ),
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_a_folder_that_is_deleted_while_the_run_goes_on_is_made_again(
    target, number, uninterrupted, tmp_path
):
    folder = tmp_path / "run"
    fault = partial(delete_at, folder, target, number)
    code, said = deleted(folder, uninterrupted, fault)
    assert "deleted it" in said
    if code:
        tiny.end(tiny.start("train", uninterrupted.settings, "--run-dir", folder))
    assert tiny.unsound(folder) == []
    assert tiny.digest(folder) == uninterrupted.digest
    tiny.end(tiny.resume(folder))


def deleted(folder, uninterrupted, fault):
    """Train while something is deleted; the run ends well, or says what it cannot save and why."""
    started = start(folder, uninterrupted, fault)
    code, said = started.wait(), started.said
    assert code in (0, 5), said
    assert (code == 5) == bool(refusals(folder, said))
    return code, said


def delete_at(folder, target, number):
    """Delete something at a system call of a save."""
    calls = layer.Within(SAVED)

    def before(_, name, words):
        if calls.count(name, words) == number:
            shutil.rmtree(TARGETS[target](folder), ignore_errors=True)
            print("deleted it", flush=True)

    layer.durable_files.system = layer.Layer(before)


def test_a_folder_that_was_deleted_between_two_saves_is_made_again(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    fault = partial(delete_before, folder / "checkpoints", SAVED)
    tiny.end(start(folder, uninterrupted, fault))
    assert tiny.unsound(folder) == []
    assert tiny.digest(folder) == uninterrupted.digest


def delete_before(folder, step):
    """Delete the checkpoints as soon as one has been announced."""
    from fundamentallm_checkpoint.storage import publish

    publishing = publish.publish

    def published(home, packed, draft, report=None):
        made = publishing(home, packed, draft, report)
        if draft.step == step and threading.current_thread().name == "checkpoint":
            shutil.rmtree(folder)
        return made

    publish.publish = published
