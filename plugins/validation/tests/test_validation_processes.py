"""Several processes log the metrics of one."""

from __future__ import annotations

import pytest
from ragged import GPT, Ragged, assert_same_rows

from fundamentallm.testing import TwoProcesses
from fundamentallm_validation import Validation


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_log_the_metrics_of_one(
    two_processes: TwoProcesses, processes: int, tmp_path: object
) -> None:
    def train(count: int) -> list[list[dict[str, float]]]:
        plugins = Ragged(), Validation(accuracy=True, bits_per_byte=True), "gpt", "adamw"
        trained = two_processes(
            *plugins,
            processes=count,
            settings=GPT,
            run_dir=f"{tmp_path}/{count}",
            length=12,
            validate_every=4,
        )
        assert {one.error for one in trained} == {None}
        return [one.history for one in trained]

    (alone,) = train(1)
    accuracies = [row["val/accuracy"] for row in alone if "val/accuracy" in row]
    assert len(accuracies) == 3
    assert alone[-1].keys() >= {"val/perplexity", "val/bits_per_byte", "best/val_accuracy"}
    for history in train(processes):
        assert_same_rows(history, alone)
        assert [row["val/accuracy"] for row in history if "val/accuracy" in row] == accuracies
