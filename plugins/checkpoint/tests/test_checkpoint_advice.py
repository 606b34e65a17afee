"""The error of a failed run says which checkpoint to resume from, and how."""

from __future__ import annotations

import shlex

import pytest

from fundamentallm import (
    DataError,
    Period,
    PluginError,
    StorageError,
    command_line,
    hookimpl,
    plugin,
)
from fundamentallm_checkpoint import Checkpoint


@plugin
class Fails:
    """Raises an error in the third step."""

    error: BaseException

    @hookimpl
    def on_step_start(self, run):
        if run.progress.step == 2:
            raise self.error


def notes(tiny_run, tmp_path, error, *plugins):
    with pytest.raises((PluginError, DataError)) as raised:
        tiny_run(Fails(error=error), *plugins, run_dir=tmp_path / "run")
    return getattr(raised.value, "__notes__", [])


def test_the_error_of_a_failed_run_names_its_newest_checkpoint_and_the_command_to_resume(
    tiny_run, tmp_path
):
    (note,) = notes(tiny_run, tmp_path, OSError("gone"), Checkpoint(every=Period(1)))
    folder = tmp_path / "run"
    assert note == (
        f"the newest finite checkpoint is {folder}/checkpoints/step-00000002; "
        f"resume with: {command_line('resume', folder)}"
    )


def test_a_checkpoint_of_the_model_only_is_not_advised_to_resume_from(tiny_run, tmp_path):
    assert (
        notes(tiny_run, tmp_path, OSError("gone"), Checkpoint(every=Period(1), contents="model"))
        == []
    )


def test_a_checkpoint_that_is_not_finite_is_not_advised(tiny_run, tmp_path):
    @plugin
    class Poisons:
        """Makes a weight infinite before the second checkpoint."""

        @hookimpl
        def on_step_end(self, run):
            if run.progress.step == 2:
                run.parameters[0].data.fill_(float("inf"))

    (note,) = notes(tiny_run, tmp_path, OSError("gone"), Poisons(), Checkpoint(every=Period(1)))
    assert "step-00000001;" in note


def test_an_error_that_resuming_would_repeat_gets_no_advice(tiny_run, tmp_path):
    assert (
        notes(tiny_run, tmp_path, DataError("the data has ended"), Checkpoint(every=Period(1)))
        == []
    )


def test_a_run_that_failed_before_its_first_checkpoint_gets_no_advice(tiny_run, tmp_path):
    assert notes(tiny_run, tmp_path, OSError("gone"), Checkpoint(every=Period(3))) == []


def test_a_checkpoint_that_was_found_damaged_is_not_advised(tiny_run, tmp_path):
    run = tiny_run(Checkpoint(every=Period(1)), length=2)
    path = run.folder / "checkpoints" / "step-00000002" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    @plugin
    class Asks:
        @hookimpl
        def on_run_start(self, run):
            run.wanted_checkpoint = "step-2"

    with pytest.raises(StorageError, match="sha256 differs") as raised:
        tiny_run(Checkpoint(every=Period(1)), Asks(), length=4)
    (note,) = raised.value.__notes__
    assert "step-00000001;" in note


def test_the_advised_command_is_quoted_for_a_shell(tiny_run, tmp_path):
    folder = tmp_path / "my run's"
    with pytest.raises(PluginError) as raised:
        tiny_run(Fails(error=OSError("gone")), Checkpoint(every=Period(1)), run_dir=folder)
    (note,) = raised.value.__notes__
    assert shlex.split(note.partition("resume with: ")[2])[-2:] == ["resume", str(folder)]
