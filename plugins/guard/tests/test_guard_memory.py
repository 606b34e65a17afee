"""A micro-batch that does not fit into memory is reported, skipped, or split with the same result."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fundamentallm import (
    Batch,
    OutOfMemoryError,
    Progress,
    Run,
    SettingsError,
    field,
    hookimpl,
    plugin,
    train,
)
from fundamentallm.testing import TinyData, TinyRun, TwoProcesses, assert_same_weights, compose_tiny
from fundamentallm_guard import Guard
from fundamentallm_guard.memory import report
from fundamentallm_guard.split_batch import split

VOCABULARY, TOKENS, PADDING = 11, 6, -100
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
    ),
    "mps": RuntimeError("MPS backend out of memory"),
    "python": MemoryError(),
}


@plugin
class Small:
    """A network with dropout that has no room for more than ``rows`` rows: in the forward pass, or
    in the backward pass after a part of its gradients is there."""

    rows: int = 2
    where: str = "forward"
    error: str = "cuda"
    dropout: float = 0.0
    seen: list[int] = field(factory=list)
    alive: list[int] = field(factory=list)
    held: list[Any] = field(factory=list)

    def limited(self, hidden: Tensor, room: Any) -> Tensor:
        self.seen.append(len(hidden))
        if self.where == "forward" and len(hidden) > self.rows:
            raise ERRORS[self.error]
        return room.apply(hidden) if self.where == "backward" else hidden

    @hookimpl
    def build_model(self) -> nn.Module:
        owner = self

        class Room(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, hidden: Tensor) -> Tensor:
                ctx.rows = len(hidden)
                return hidden.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                if ctx.rows > owner.rows:
                    raise ERRORS[owner.error]
                return grad

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.hidden = nn.Linear(8, 16)
                self.dropout = nn.Dropout(owner.dropout)
                self.out = nn.Linear(16, 1)
                self.double()

            def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                owner.alive.append(sum(ref() is not None for ref in owner.held))
                hidden = self.hidden(inputs.double())
                owner.held[:] = [weakref.ref(hidden)]
                hidden = owner.limited(hidden, Room) if self.training else hidden
                out = self.out(self.dropout(torch.tanh(hidden)))
                return nn.functional.mse_loss(out, targets.double())

        return Net()


def accumulating(count: int) -> dict[str, Any]:
    return {"accumulate": {"microbatches": count}}


def close(one: Run, other: Run) -> None:
    for mine, theirs in zip(one.parameters, other.parameters, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    for mine, theirs in zip(one.history, other.history, strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=0, abs=1e-12)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_split_microbatches_train_as_whole_ones(
    tiny_run: TinyRun, tmp_path: Path, rows: int, where: str
) -> None:
    parts, table = (
        ["accumulate", TinyData(batch_size=5)],
        {"settings": accumulating(3), "length": 5},
    )
    whole = tiny_run(*parts, Small(rows=99), **table, run_dir=tmp_path / "whole")
    guard = Guard(oom="split")
    split = tiny_run(*parts, guard, Small(rows=rows, where=where), **table)
    close(split, whole)
    assert guard.halvings == {1: 3, 2: 2, 3: 1}[rows]
    assert split.progress.samples == whole.progress.samples == 75
    assert split.progress.tokens == whole.progress.tokens


def test_micro_batches_stay_split_for_the_rest_of_the_run(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    small = Small(rows=2)
    run = tiny_run(Guard(oom="split"), small, length=3)
    assert small.seen == [4, 2, 2, 2, 2, 2, 2]
    assert run.progress.microbatches == 1 + 2 + 2
    (said,) = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert said.startswith(
        "step 1: out of memory in a micro-batch of 4 samples from index 0: CUDA out of memory."
    )
    assert "process memory: " in said
    assert said.endswith("from now on micro-batches are split into 2")


def test_out_of_memory_in_the_middle_of_a_window_discards_the_gradients_so_far(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    @plugin
    class Shrinks:
        """Leaves less room from the second micro-batch of step 2 on."""

        small: Any
        seen: int = 0

        @hookimpl(wrapper=True)
        def forward(self, run: Run) -> Iterator[None]:
            self.seen += run.phase == "train"
            self.small.rows = 99 if self.seen < 5 else 2
            return (yield)

    small = Small(where="backward", dropout=0.0)
    table = {"settings": accumulating(3), "length": 4}
    split = tiny_run("accumulate", Guard(oom="split"), small, Shrinks(small=small), **table)
    whole = tiny_run("accumulate", Small(rows=99), **table, run_dir=tmp_path / "whole")
    close(split, whole)
    assert small.seen == [4, 4, 4, 4, 4] + 3 * 6 * [2]


def test_a_repeated_step_equals_the_step_of_a_run_that_was_split_before(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    @plugin
    class AlreadySplit(Guard):
        """Splits from the first step on."""

        def __attrs_post_init__(self) -> None:
            self.halvings = 1

    small = {"rows": 2, "where": "backward", "dropout": 0.3}
    table = {"settings": accumulating(2), "length": 5}
    one = tiny_run("accumulate", Guard(oom="split"), Small(**small), **table)
    other = tiny_run(
        "accumulate", AlreadySplit(oom="split"), Small(**small), **table, run_dir=tmp_path / "other"
    )
    assert_same_weights(one, other)
    assert one.history == other.history


def test_the_tensors_of_the_failed_attempt_are_released_before_it_is_repeated(
    tiny_run: TinyRun,
) -> None:
    small = Small(rows=1)
    tiny_run(Guard(oom="split"), small, length=1)
    assert small.seen == [4, 2, 1, 1, 1, 1]
    assert small.alive[:3] == [0, 0, 0]


def test_the_window_has_a_loss_for_each_of_its_parts(tiny_run: TinyRun) -> None:
    shapes: list[Any] = []

    @plugin
    class Looks:
        """Looks at the losses of each step."""

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            shapes.append([len(run.losses), [batch.samples for batch in run.window]])

    tiny_run("accumulate", Guard(oom="split"), Small(), Looks(), settings=accumulating(2), length=2)
    assert shapes == [[4, [2, 2, 2, 2]]] * 2


def test_a_run_resumed_after_a_split_is_split_and_ends_with_the_same_bits(
    tiny_run: TinyRun, tmp_path: Path
) -> None:
    @plugin
    class Stops:
        """Stops the run after step 3."""

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            if run.progress.step == 3:
                run.stop("enough for now")

    def parts() -> list[Any]:
        return ["checkpoint", Guard(oom="split"), Small(dropout=0.3)]

    table = {"settings": {"checkpoint": {"every": 100}}, "length": 7}
    whole = tiny_run(*parts(), **table)
    tiny_run(*parts(), Stops(), **table, run_dir=tmp_path / "parts")
    guard, small = Guard(oom="split"), Small(dropout=0.3)
    rest = tiny_run("checkpoint", guard, small, **table, run_dir=tmp_path / "parts")
    assert_same_weights(whole, rest)
    assert small.seen == [2] * 8


@plugin
class Uneven(TinyData):
    """The tiny samples; the second window of two micro-batches is missing, or ends with a large
    one."""

    large: bool = False

    @hookimpl
    def build_data(self, run: Run) -> Any:
        data = super().build_data(run=run)
        produce = data.batches

        def batches(progress: Progress) -> Iterator[Batch]:
            for batch in produce(progress):
                if self.large and batch.first == 12:
                    batch.data = tuple(torch.cat([tensor, tensor]) for tensor in batch.data)
                if self.large or not 8 <= batch.first < 16:
                    yield batch

        data.batches = batches
        return data


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_skipped_step_is_as_if_its_data_had_not_been_there(
    tiny_run: TinyRun, tmp_path: Path, where: str
) -> None:
    table = {"settings": {**accumulating(2), "grad_clip": {"max_norm": 1.0}}}
    room, guard = {"rows": 4, "where": where, "dropout": 0.3}, Guard(oom="skip")
    parts = ["accumulate", "grad_clip"]
    skipped = tiny_run(*parts, guard, Uneven(large=True), Small(**room), **table, length=6)
    lacking = tiny_run(
        *parts, Uneven(), Small(**room), **table, length=5, run_dir=tmp_path / "lacking"
    )
    assert_same_weights(skipped, lacking)
    assert guard.skipped == 1


def test_a_window_that_begins_with_a_large_sample_can_be_skipped(tiny_run: TinyRun) -> None:
    small = Small(rows=3)
    run = tiny_run(
        "accumulate", Guard(oom="skip", nonfinite="stop"), small, settings=accumulating(3), length=4
    )
    assert small.seen == [4, 4, 4, 4], "the rest of a rejected window is not computed"
    assert (run.progress.applied, run.progress.step) == (0, 4)
    assert (len(run.window), len(run.losses), run.progress.microbatches) == (3, 3, 12)


def test_more_than_max_skips_consecutive_steps_out_of_memory_end_the_run(tiny_run: TinyRun) -> None:
    with pytest.raises(OutOfMemoryError, match=r"^step 3: out of memory [\s\S]*the 2 steps before"):
        tiny_run(Guard(oom="skip", max_skips=2), Small())


@pytest.mark.parametrize("error", sorted(ERRORS))
def test_every_form_of_an_out_of_memory_error_is_recognized(tiny_run: TinyRun, error: str) -> None:
    guard = Guard(oom="split")
    assert tiny_run(guard, Small(error=error), length=1).progress.applied == 1
    assert guard.halvings == 1


@pytest.mark.parametrize("error", ["cpu", "cuda", "python"])
def test_by_default_the_run_ends_with_a_report(tiny_run: TinyRun, error: str) -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        tiny_run(Guard(), Small(error=error))
    text = str(caught.value)
    assert text.startswith("after step 0: out of memory: ")
    assert str(ERRORS[error]) in text
    assert " MiB at its peak\n" in text
    assert text.endswith("oom = 'split'")


def test_out_of_memory_in_the_update_ends_the_run_with_a_report(tiny_run: TinyRun) -> None:
    @plugin
    class Hoards:
        """Has no room for the optimizer's state."""

        @hookimpl
        def optimizer_step(self) -> None:
            raise ERRORS["cuda"]

    with pytest.raises(OutOfMemoryError, match="Tried to allocate 2[\\s\\S]*process memory: "):
        tiny_run(Guard(oom="split"), Hoards())


def test_a_single_sample_that_does_not_fit_ends_the_run(tiny_run: TinyRun) -> None:
    with pytest.raises(
        OutOfMemoryError, match="1 samples from index 0[\\s\\S]*nothing is left to split"
    ):
        tiny_run(Guard(oom="split"), Small(rows=0))


def test_other_errors_pass_through(tiny_run: TinyRun) -> None:
    @plugin
    class Fails:
        """Fails."""

        @hookimpl
        def backward(self) -> None:
            raise RuntimeError("something else")

    with pytest.raises(Exception, match=r"'fails'.*failed in backward: .*something else"):
        tiny_run(Guard(oom="split"), Fails())


@pytest.mark.parametrize("oom", ["skip", "split"])
def test_several_processes_cannot_skip_or_split_one_by_one(
    two_processes: TwoProcesses, oom: Any
) -> None:
    for rank, one in enumerate(two_processes(Guard(oom=oom))):
        assert isinstance(one.error, SettingsError)
        assert f"guard.oom: '{oom}' works with one process only" in str(one.error)
        assert one.error.printed_elsewhere is (rank > 0)


def test_the_report_on_a_cpu_states_the_memory_of_the_process() -> None:
    words = report("cpu").split()
    assert words[:2] == ["process", "memory:"]
    resident, peak = int(words[2]), int(words[5])
    assert 10 < resident <= peak < 10**6


@plugin
class Greedy:
    """Asks for more memory than any machine has, unless there are two rows at most."""

    @hookimpl
    def build_model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(8, 1)

            def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                if self.training and len(inputs) > 2:
                    torch.empty(2**50, dtype=torch.uint8, device=inputs.device)
                return nn.functional.mse_loss(self.linear(inputs), targets)

        return Net()


@pytest.mark.parametrize("device", DEVICES)
def test_the_error_that_torch_raises_when_memory_runs_out_is_recognized(
    tiny_run: TinyRun, tmp_path: Path, device: str
) -> None:
    guard = Guard(oom="split")
    assert tiny_run(guard, Greedy(), device=device).progress.applied == 4
    assert guard.halvings == 1
    message = "process memory: " if device == "cpu" else "PyTorch CUDA memory summary"
    with pytest.raises(OutOfMemoryError, match=message):
        tiny_run(Guard(), Greedy(), device=device, run_dir=tmp_path / "stop")


def tokens(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int]) -> Tensor:
    targets = tokens(len(lengths), 1)
    for row, length in enumerate(lengths):
        targets[row, length:] = PADDING
    return targets


def mask(lengths: list[int]) -> Tensor:
    return torch.arange(TOKENS) < torch.tensor(lengths)[:, None]


FORMS: dict[str, Any] = {
    "ignored": lambda lengths: (tokens(len(lengths)), padded(lengths)),
    "masked": lambda lengths: {
        "inputs": tokens(len(lengths)),
        "mask": mask(lengths),
        "positions": torch.arange(TOKENS + 99),
        "scale": torch.tensor(2.0),
        "note": None,
    },
    "counted": lambda lengths: (tokens(len(lengths)), mask(lengths).double()),
    "shifted": lambda lengths: {
        "input_ids": torch.cat([tokens(len(lengths))[:, :1], tokens(len(lengths))], dim=1),
        "labels": torch.cat([tokens(len(lengths))[:, :1], padded(lengths)], dim=1),
    },
}


@pytest.mark.parametrize("form", sorted(FORMS))
@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, TOKENS), min_size=1, max_size=9), times=st.integers(1, 4))
def test_each_part_has_the_weight_of_its_targets(form: str, lengths: list[int], times: int) -> None:
    data = FORMS[form](lengths)
    whole = Batch(data, float(sum(lengths)), len(lengths), 7 * len(lengths), first=40)
    parts = split([whole], times)
    rows = 0
    for part in parts:
        first = next(iter(part.data.values() if isinstance(part.data, dict) else part.data))
        own = lengths[rows : rows + len(first)]
        assert (part.first, part.samples, part.tokens) == (40 + rows, len(own), 7 * len(own))
        assert part.weight == sum(own)
        rows += len(first)
    assert rows == len(lengths)
    assert max(len(part.data) for part in parts) == len(data)


def test_only_tensors_with_the_rows_of_the_batch_are_split() -> None:
    (head, tail) = split([Batch(FORMS["masked"]([3, 1, 2]), 6.0, 3, 18)], 1)
    for part, rows in ((head, 1), (tail, 2)):
        assert part.data["inputs"].shape == part.data["mask"].shape == (rows, TOKENS)
        assert part.data["positions"].shape == (TOKENS + 99,)
        assert part.data["note"] is None
        assert part.data["inputs"].data_ptr() >= head.data["inputs"].data_ptr(), "nothing is copied"


@plugin
class Sentences:
    """Sentences of given lengths in one window after the other, as tokens and padded targets."""

    lengths: list[int]
    knows_size: bool = True

    @hookimpl
    def build_data(self) -> Any:
        return Corpus(self.lengths, self.knows_size)


class Corpus:
    epoch_samples = None
    fingerprint = "sentences"

    def __init__(self, lengths: list[int], knows_size: bool) -> None:
        self.lengths, self.knows_size = lengths, knows_size

    def batches(self, _: Progress) -> Iterator[Batch]:
        data = (tokens(len(self.lengths)), padded(self.lengths))
        weight = sum(self.lengths)
        while True:
            if self.knows_size:
                yield Batch(data, weight, len(self.lengths), weight)
            else:  # a weight that nothing in the data explains
                yield Batch(data, weight + 0.5, len(self.lengths), weight)

    def validation(self) -> dict[str, list[Batch]]:
        return {}


@plugin
class Bigram:
    """Predicts the next token from the current one; has room for ``rows`` rows."""

    rows: int = 99

    @hookimpl
    def build_model(self) -> nn.Module:
        owner = self

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.scores = nn.Embedding(VOCABULARY, VOCABULARY).double()

            def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
                if len(inputs) > owner.rows:
                    raise torch.OutOfMemoryError("no room")
                scores = self.scores(inputs)
                return nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten())

        return Net()


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(0, TOKENS), min_size=2, max_size=7).filter(any), st.integers(1, 3))
def test_padded_sentences_split_anyhow_have_the_gradient_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], rows: int
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        train(
            compose_tiny(
                *guards,
                Sentences(lengths=lengths),
                Bigram(rows=room),
                length=1,
                validate_every=None,
            ),
            run_dir=folder / name,
        )
        for name, guards, room in [("whole", [], 99), ("split", [Guard(oom="split")], rows)]
    ]
    one, other = (run.model.scores.weight.grad for run in runs)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_an_unknown_weight_is_shared_by_rows_with_a_warning(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    data = Sentences(lengths=[6, 1, 3, 2], knows_size=False)
    weights: list[list[float]] = []

    @plugin
    class Looks:
        """Looks at the weights."""

        @hookimpl
        def on_step_end(self, run: Run) -> None:
            weights.append([batch.weight for batch in run.window])

    tiny_run(Guard(oom="split"), data, Bigram(rows=2), Looks(), length=2, validate_every=None)
    assert weights == [[6.25, 6.25]] * 2
    assert caplog.text.count("does not show how many targets each row has: all rows get") == 1
