"""What may change while a run goes on: the batch size, the context length, and that it goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fundamentallm import Batch, Progress, Run, SettingsError, hookimpl, plugin
from fundamentallm.testing import TinyRun
from fundamentallm_text import Text

VERSE = "The quick brown fox jumps over the lazy dog.\n" * 40

ChangingRun = Callable[..., Run]


@plugin
class Bigram:
    """Predicts each token from the one before; sees as far as its ``reach`` says."""

    reach: int | None = None
    """What the model says that its context length is."""

    @hookimpl
    def build_model(self, run: Run) -> nn.Module:
        class Table(nn.Module):
            def __init__(self, vocab_size: int) -> None:
                super().__init__()
                self.scores = nn.Embedding(vocab_size, vocab_size)

            def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                scores = self.scores(inputs).flatten(0, 1)
                return nn.functional.cross_entropy(scores, targets.flatten())

        model: Any = Table(run.data.vocab_size)  # type: ignore[attr-defined]
        if self.reach is not None:
            model.context_length = self.reach
        return model  # type: ignore[no-any-return]


@plugin
class Changes:
    """Sets the text's settings at the beginning of steps, and keeps what each step read."""

    at: dict[str, Any]
    """Step -> the settings to change before it."""

    def __attrs_post_init__(self) -> None:
        self.read: list[Batch] = []
        self.held_out: list[list[Tensor]] = []
        self.threads: list[int] = []

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        for name, value in self.at.get(str(run.progress.step), {}).items():
            setattr(run.plugins["text"], name, value)
            run.reopen_data()

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        self.read += run.window
        self.held_out.append([b.data[0] for b in run.data.validation()["val"]])
        self.threads.append(threading.active_count())


@pytest.fixture
def changing_run(tiny_run: TinyRun, tmp_path: Path) -> ChangingRun:
    """Train for six steps on a verse, with changes between them."""
    (tmp_path / "verse.txt").write_text(VERSE)

    def start(*in_thread: object, reach: int | None = None, **text: Any) -> Run:
        usual: dict[str, Any] = {"path": tmp_path / "verse.txt"}
        usual |= {"context_length": 8, "batch_size": 4}
        folder = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        parts = (Text(**usual | text), Bigram(reach=reach))
        return tiny_run(*parts, *in_thread, run_dir=folder, length=6)

    return start


def _rows(batches: list[Batch]) -> list[list[int]]:
    return [row for b in batches for row in torch.cat([b.data[0], b.data[1][:, -1:]], 1).tolist()]


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("sampling", ["random", "epochs"])
def test_a_changed_batch_size_continues_with_the_next_sample(
    changing_run: ChangingRun, sampling: Any, prefetch: int
) -> None:
    usual = Changes(at={})
    changing_run(usual, sampling=sampling)
    changes = Changes(at={"2": {"batch_size": 7}, "4": {"batch_size": 1}})
    run = changing_run(changes, sampling=sampling, prefetch=prefetch)
    assert [batch.samples for batch in changes.read] == [4, 4, 7, 7, 1, 1]
    assert [batch.first for batch in changes.read] == [0, 4, 8, 15, 22, 23]
    assert run.progress.samples == 24
    assert run.progress.tokens == 24 * 8
    assert _rows(changes.read) == _rows(usual.read)


def test_a_changed_context_length_gives_windows_of_that_length(changing_run: ChangingRun) -> None:
    changes = Changes(
        at={
            "0": {"context_length": 3},
            "2": {"context_length": 5, "batch_size": 2},
            "4": {"context_length": 8},
        }
    )
    run = changing_run(changes)
    assert [tuple(b.data[0].shape) for b in changes.read] == [
        (4, 3),
        (4, 3),
        (2, 5),
        (2, 5),
        (2, 8),
        (2, 8),
    ]
    assert [batch.first for batch in changes.read] == [0, 4, 8, 10, 12, 14]
    assert [batch.weight for batch in changes.read] == [12, 12, 10, 10, 16, 16]
    assert run.progress.tokens == 2 * (12 + 10 + 16)
    for row in _rows(changes.read):
        assert run.tokenizer is not None
        assert run.tokenizer.decode(row) in VERSE


def test_a_window_is_a_function_of_the_sample_index_and_the_length(
    changing_run: ChangingRun,
) -> None:
    """A resumed run, which changes the settings before its first step, reads the same."""
    changes = Changes(at={"2": {"context_length": 5, "batch_size": 2}})
    run = changing_run(changes)
    text = run.plugins["text"]
    assert (text.context_length, text.batch_size) == (5, 2)
    resumed = islice(run.data.batches(Progress(samples=10)), 3)
    assert _rows(list(resumed)) == _rows(changes.read[3:])


def test_the_validation_windows_stay_those_of_the_start(changing_run: ChangingRun) -> None:
    changes = Changes(at={"2": {"context_length": 3, "batch_size": 9}})
    changing_run(changes)
    first = changes.held_out[0]
    assert {inputs.shape[1] for inputs in first} == {8}
    for later in changes.held_out:
        assert all(a.equal(b) for a, b in zip(first, later, strict=True))


def test_a_stream_that_is_replaced_leaves_no_thread(changing_run: ChangingRun) -> None:
    before = threading.active_count()
    sizes = {str(step): {"batch_size": step + 2} for step in range(6)}
    changes = Changes(at=sizes)
    changing_run(changes, prefetch=2)
    assert changes.threads == [before + 1] * 6
    assert threading.active_count() == before


def test_a_changed_context_length_is_an_error_with_epochs(changing_run: ChangingRun) -> None:
    with pytest.raises(SettingsError, match="cannot change from 8 to 4 during a run with sampling"):
        changing_run(Changes(at={"1": {"context_length": 4}}), sampling="epochs")


@pytest.mark.parametrize(("reach", "length"), [(None, 9), (12, 13), (12, 0), (None, -1)])
def test_a_context_length_that_the_model_was_not_built_for_is_an_error(
    changing_run: ChangingRun, reach: int | None, length: int
) -> None:
    with pytest.raises(
        SettingsError, match=rf"cannot change to {length} .* 1 to {reach or 8} tokens"
    ):
        changing_run(Changes(at={"1": {"context_length": length}}), reach=reach)


def test_a_model_with_a_longer_context_takes_longer_windows(changing_run: ChangingRun) -> None:
    changes = Changes(at={"3": {"context_length": 12}})
    changing_run(changes, reach=12)
    assert [batch.data[0].shape[1] for batch in changes.read] == [8, 8, 8, 12, 12, 12]


def test_a_batch_size_of_zero_is_an_error(changing_run: ChangingRun) -> None:
    with pytest.raises(SettingsError, match=r"text\.batch_size: 0 windows"):
        changing_run(Changes(at={"1": {"batch_size": 0}}))


@plugin
class Terminates:
    """Sends the process a signal during a task, and waits until the run has noted it."""

    task: str
    """The task."""

    def __attrs_post_init__(self) -> None:
        self.reported: list[str] = []
        self.signal: int | None = None

    @hookimpl
    def on_progress(self, run: Run, task: str) -> None:
        self.reported.append(task)
        if task == self.task:
            os.kill(os.getpid(), signal.SIGTERM)
            patience = time.monotonic() + 10
            while run.signal is None and time.monotonic() < patience:
                time.sleep(0.001)
            self.signal = run.signal

    @hookimpl
    def on_train_start(self) -> None:
        self.reported.append("on_train_start")


@pytest.mark.parametrize(
    ("tokenizer", "task"),
    [
        ("char", "reading the alphabet"),
        ("byte", "tokenizing"),
        ("bpe", "learning the tokenizer"),
        ("bpe", "merging pairs"),
        ("bpe", "tokenizing"),
    ],
)
def test_a_signal_ends_the_reading_of_text_at_once_and_leaves_no_draft(
    changing_run: ChangingRun, tmp_path: Path, tokenizer: Any, task: str
) -> None:
    (tmp_path / "verse.txt").write_text(VERSE * 2000)  # several megabytes: several reports
    terminates = Terminates(task=task)
    cache = tmp_path / "kept"
    run = changing_run(terminates, tokenizer=tokenizer, cache_dir=cache, max_bytes=3_500_000)
    assert (run.outcome, run.signal, terminates.signal) == ("interrupted", *2 * [signal.SIGTERM])
    assert terminates.reported[-1] == task
    assert terminates.reported.count(task) == 1
    assert not list(cache.glob("*.tmp"))
    (tmp_path / "verse.txt").write_text(VERSE)
    assert changing_run(tokenizer=tokenizer, cache_dir=cache).outcome == "finished"


def test_only_batch_size_and_context_length_are_changeable(changing_run: ChangingRun) -> None:
    """A plugin that lets settings follow schedules asks the class."""
    changes = Changes(at={"1": dict.fromkeys(Text.changeable, 3)})
    changing_run(changes)
    assert [tuple(batch.data[0].shape) for batch in changes.read[:2]] == [(4, 8), (3, 3)]
