"""Several processes treat bad data in one of them as one process does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ragged import assert_same_rows, furthest

from fundamentallm import Batch, Data, NotFiniteError, Run, hookimpl, plugin
from fundamentallm.testing import TinyModel, TinySamples, Trained, TwoProcesses
from fundamentallm_guard import Guard

SIZE = 7  # samples of a batch: two processes have three and four of them
STEP = 12  # the step with bad data


@plugin
class Poisoned:
    """Samples in float64, one of which has a wrong target: in the part of the second process."""

    bad: float = math.nan

    @hookimpl
    def build_data(self, run: Run) -> Data:
        torch.set_default_dtype(torch.float64)
        bad = self.bad

        class Samples(TinySamples):
            def batch(self, indices: range) -> Batch:
                batch = super().batch(indices)
                inputs, targets = (tensor.double() for tensor in batch.data)
                index = SIZE * STEP - 2 - batch.first
                if 0 <= index < len(targets):
                    targets[index] = bad
                batch.data = inputs, targets
                return batch

        return Samples(SIZE, run.device, (run.data_rank, run.data_size))


@pytest.fixture
def train(two_processes: TwoProcesses, tmp_path: Path) -> Callable[..., list[Trained]]:
    def start(
        processes: int, bad: float, guard: dict[str, Any], kind: str = "ddp"
    ) -> list[Trained]:
        return two_processes(
            *(Poisoned(bad=bad), TinyModel(dropout=0.0), Guard(**guard), "checkpoint"),
            settings={"checkpoint": {"every": 2, "keep_last": 20}},
            processes=processes,
            kind=kind,
            run_dir=tmp_path / str(processes),
            length=20,
            validate_every=5,
        )

    return start


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("bad", "guard"),
    [
        (math.nan, {"nonfinite": "skip"}),
        (math.inf, {"nonfinite": "rewind"}),
        (1e4, {"spike": "skip", "spike_window": 5}),
        (1e4, {"spike": "rewind", "spike_window": 5}),
    ],
)
def test_bad_data_in_one_process_has_the_consequences_of_bad_data_in_one(
    train: Callable[..., list[Trained]], bad: float, guard: dict[str, Any], kind: str
) -> None:
    (alone,) = train(1, bad, guard)
    state = alone.states["guard"]
    assert (state["skipped"], state["rewinds"]) == (
        (0, 1) if "rewind" in guard.values() else (1, 0)
    )
    for one in train(2, bad, guard, kind):
        assert one.outcome == "finished", one.error
        assert furthest(one.weights, alone.weights) <= 1e-14
        assert_same_rows(one.history, alone.history)
        found = dict(one.states["guard"])
        assert found.pop("losses") == pytest.approx(state["losses"], rel=1e-12, abs=0)
        assert found == {name: value for name, value in state.items() if name != "losses"}


def test_the_process_with_the_bad_data_says_where_it_is_and_all_end(
    train: Callable[..., list[Trained]],
) -> None:
    first, second = train(2, math.nan, {"nonfinite": "stop"})
    assert isinstance(first.error, NotFiniteError)
    assert str(first.error) == str(second.error)
    text = "step 12: the loss is nan (process 1's part of 7 samples from index 80 in the order of"
    assert text in str(first.error)
    assert (first.error.printed_elsewhere, second.error.printed_elsewhere) == (False, True)
