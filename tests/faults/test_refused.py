"""A disk that refuses a save leaves the earlier checkpoints, and the run does as it was told."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import threading
from functools import partial

import layer
import pytest
import tiny
from tiny import EVERY

SAVED = 3 * EVERY
"""The step whose save goes wrong."""
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
# About as many system calls as a save makes, with what it deletes after.
CALLS = 75


def refused(folder, uninterrupted, fault, on_save_error):
    """Train with a fault in the save of a step; see that it is told and then made good."""
    words = ["--run-dir", folder, "--set", f'checkpoint.on_save_error="{on_save_error}"']
    started = tiny.start("train", uninterrupted.settings, *words, before=fault)
    code, said = started.wait(), started.said
    assert code in (0, 5), said
    assert "Traceback" not in said
    assert tiny.unsound(folder) == []
    failed = re.search(r"checkpoint of step (\d+) could not be saved: (.+)\. Earlier", said)
    if failed is not None:
        assert str(folder / "checkpoints") in failed[2], said
        assert (code == 0) == (on_save_error == "continue")
        if code:
            step = int(failed[1])
            assert tiny.steps(folder)[-1] >= step - EVERY
            assert tiny.reached(folder) <= step + EVERY
    else:
        assert code == 0, said
    if code:
        tiny.end(tiny.resume(folder, "--set", 'checkpoint.on_save_error="stop"'))
    assert tiny.digest(folder) == uninterrupted.digest
    assert tiny.rows(folder) == uninterrupted.rows
    return failed, said


def check_refusal(folder, uninterrupted, number, error, on_save_error):
    fault = partial(layer.refuse, SAVED, number, error)
    failed, said = refused(folder, uninterrupted, fault, on_save_error)
    assert "refused:" in said, "there is no such call: lower CALLS"
    # What can no longer be deleted is a warning; all else costs the checkpoint.
    assert failed or "could not be deleted" in said
    assert os.strerror(error) in (failed[2] if failed else said)


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_a_refused_call_of_a_save_is_told_with_path_and_cause(
    error, on_save_error, uninterrupted, tmp_path
):
    number = random.Random(f"{error} {on_save_error}").randrange(1, CALLS)
    check_refusal(tmp_path / "run", uninterrupted, number, error, on_save_error)


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("number", range(1, CALLS + 1))
def test_every_call_of_a_save_may_be_refused(number, error, uninterrupted, tmp_path):
    on_save_error = ("stop", "continue")[(number + error) % 2]
    check_refusal(tmp_path / "run", uninterrupted, number, error, on_save_error)


@pytest.mark.parametrize("call", ["write", "rename", "unlink", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("open", "fsync", "mkdir", "rmdir"))])
def test_a_disk_that_refuses_from_some_moment_on_leaves_what_was_saved(
    call, uninterrupted, tmp_path
):
    fault = partial(layer.gone_at, SAVED, errno.EROFS, call=call)
    _, said = refused(tmp_path / "run", uninterrupted, fault, "stop")
    assert "Read-only file system" in said


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_disk_that_is_full_though_it_said_not_to_be(on_save_error, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    words = ["--run-dir", folder, "--set", f'checkpoint.on_save_error="{on_save_error}"',
             "--set", "checkpoint.keep_last=50"]  # fmt: skip
    started = tiny.start("train", uninterrupted.settings, *words, before=partial(layer.quota, 250_000))
    code, said = started.wait(), started.said
    assert code == (5 if on_save_error == "stop" else 0), said
    assert "No space left on device. Earlier checkpoints" in said
    assert tiny.unsound(folder) == []
    assert tiny.steps(folder)
    assert not list(folder.glob("checkpoints/.*"))
    tiny.end(tiny.resume(folder))
    assert tiny.rows(folder) == uninterrupted.rows


def test_a_disk_of_8_mb_that_fills_up(tmp_path):
    large = {"gpt": {"d_model": 64}, "checkpoint": {"every": 2, "keep_last": 50}}
    settings = tiny.write_settings(tmp_path / "large", **large)
    folder, copied = tmp_path / "disk", tmp_path / "copied"
    before = partial(layer.small_disk, folder, copied)
    said = tiny.end(tiny.start("train", settings, "--run-dir", folder, before=before), 5)
    assert re.search(r"step \d+ could not be saved: .*No space left on device", said)
    assert tiny.unsound(copied) == []
    assert tiny.steps(copied)
    tiny.end(tiny.resume(copied))
    tiny.end(tiny.start("train", settings, "--run-dir", tmp_path / "whole"))
    assert tiny.digest(copied) == tiny.digest(tmp_path / "whole")


def test_a_folder_that_is_deleted_while_the_run_goes_on_is_made_again(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    started = tiny.start("train", uninterrupted.settings, "--run-dir", folder, before=partial(
        delete_at, folder / "checkpoints", SAVED))  # fmt: skip
    said = tiny.end(started) if started.wait() == 0 else tiny.end(started, 5)
    if started.process.exitcode:
        assert "were deleted, by whomever" in said
        tiny.end(tiny.resume(folder))
    assert tiny.unsound(folder) == []
    assert tiny.digest(folder) == uninterrupted.digest


def delete_at(folder, step):
    """Delete the checkpoints while one is being written."""
    calls = layer.Within(step)

    def before(_, name, words):
        if calls.count(name, words) == 20:
            shutil.rmtree(folder)

    layer.files.system = layer.Layer(before)


def test_a_folder_that_was_deleted_between_two_saves_is_made_again(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    started = tiny.start("train", uninterrupted.settings, "--run-dir", folder, before=partial(
        delete_before, folder / "checkpoints", SAVED))  # fmt: skip
    tiny.end(started)
    assert tiny.unsound(folder) == []
    assert tiny.digest(folder) == uninterrupted.digest


def delete_before(folder, step):
    """Delete the checkpoints as soon as one has been announced."""
    from fundamentallm_checkpoint import publication

    publish = publication.publish

    def published(home, packed, draft, report=None):
        made = publish(home, packed, draft, report)
        if draft.step == step and threading.current_thread().name == "checkpoint":
            shutil.rmtree(folder)
        return made

    publication.publish = published
