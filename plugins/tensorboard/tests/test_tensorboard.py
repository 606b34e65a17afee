"""TensorBoard's own reader finds in a run's event files what the run logged, once."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as ServerAccumulator,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util import tensor_util

from fundamentallm import hookimpl, plugin
from fundamentallm.testing import LoggerContract, Memory, TinyRun
from fundamentallm_tensorboard import Tensorboard

if TYPE_CHECKING:
    from fundamentallm import Run


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "tensors": 0})
    return found.Reload()


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value by metric, as the public reader has them."""
    found = read(folder)
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def served(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same as the server that draws the plots has them."""
    sizes = {"scalars": 0, "tensors": 0}
    found = ServerAccumulator(str(folder / "tensorboard"), sizes, {"scalars": 0}).Reload()
    return {
        tag: [(e.step, tensor_util.make_ndarray(e.tensor_proto).item()) for e in found.Tensors(tag)]
        for tag, data in ((t, found.SummaryMetadata(t)) for t in found.Tags()["tensors"])
        if data.plugin_data.plugin_name == "scalars"
    }


def rounded(rows: list[dict[str, float]]) -> dict[str, list[tuple[int, float]]]:
    """What the rows of a run become in a format of 32 bits."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                found.setdefault(name, []).append((int(row["step"]), float(np.float32(value))))
    return found


class TestContract(LoggerContract):
    plugin = Tensorboard
    target = "tensorboard"
    aside = "tensorboard.before-*"
    cut_short = (b"\x17\x00\x00\x00\x00",)  # the start of a record

    def rows(self, folder: Path) -> list[dict[str, float]]:
        found: dict[int, dict[str, float]] = {}
        read_back, drawn = points(folder), served(folder)
        assert repr(read_back) == repr(drawn)
        for name, values in read_back.items():
            assert len({step for step, _ in values}) == len(values), f"{name}: a step twice"
            for step, value in values:
                found.setdefault(step, {"step": step})[name] = value
        return [found[step] for step in sorted(found)]

    def stored(self, value: float) -> float:
        with np.errstate(over="ignore", under="ignore"):
            return float(np.float32(value))

    def unwritable(self, folder: Path) -> Tensorboard:
        folder.mkdir()
        (folder / "tensorboard").write_text("in the way")
        return Tensorboard()


HISTOGRAMS = {"grad_stats": {"every": 2, "histograms": True}}


def histograms(folder: Path) -> dict[str, list[tuple[int, list[list[float]]]]]:
    """Step and bins (left, right, count) by name, as the server that draws them has them."""
    sizes = {"scalars": 0, "tensors": 0}
    found = ServerAccumulator(str(folder / "tensorboard"), sizes, {"histograms": 0}).Reload()
    return {
        tag: [
            (e.step, tensor_util.make_ndarray(e.tensor_proto).tolist()) for e in found.Tensors(tag)
        ]
        for tag in found.Tags()["tensors"]
        if found.SummaryMetadata(tag).plugin_data.plugin_name == "histograms"
    }


def counted(folder: Path, rows: list[int]) -> dict[str, list[tuple[int, list[list[float]]]]]:
    """The same from the lines of the plugin that counts: sums of what a row's steps have."""
    lines = [json.loads(line) for line in (folder / "grad_stats.jsonl").read_text().splitlines()]
    found: dict[str, list[tuple[int, list[list[float]]]]] = {}
    for last, row in pairwise([0, *rows]):
        counts = [line["counts"] for line in lines if last < line["step"] <= row]
        for group in counts[0]:
            sums = [sum(each) for each in zip(*(one[group] for one in counts), strict=True)]
            bins = [[left, left + 1.0, n] for left, n in zip(range(-13, 5), sums, strict=True)]
            found.setdefault(f"grad_stats/{group}", []).append((row, bins))
    return found


def settings_texts(folder: Path) -> list[tuple[int, str]]:
    return [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in read(folder).Tensors("settings")
    ]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "tensorboard").iterdir())


def test_the_points_are_the_metrics_that_the_run_logged(tiny_run: TinyRun) -> None:
    run = tiny_run(Tensorboard(), length=5, validate_every=4)
    assert points(run.folder) == served(run.folder) == rounded(run.history)
    assert set(points(run.folder)) >= {"train/loss", "optim/lr", "train/tokens", "val/loss"}


def test_a_validation_before_the_first_step_is_a_point_at_step_0(tiny_run: TinyRun) -> None:
    run = tiny_run(Tensorboard(), length=2, validate_first=True)
    assert [step for step, _ in points(run.folder)["val/loss"]] == [0, 2]
    assert served(run.folder) == points(run.folder)


def test_files_of_one_second_are_read_in_the_order_in_which_they_were_made(
    tiny_run: TinyRun,
) -> None:
    memory = Memory(step=2)
    for length in (3, 4, 5, 6):
        run = tiny_run(Tensorboard(), memory, length=length, log_every=1)
    assert len(files(run.folder)) == 4
    assert [step for step, _ in points(run.folder)["train/loss"]] == [1, 2, 3, 4, 5, 6]


def test_the_settings_are_a_text_at_their_first_step(tiny_run: TinyRun) -> None:
    memory = Memory(step=2)
    tiny_run(Tensorboard(), memory, length=4, log_every=2)
    run = tiny_run(Tensorboard(), memory, length=6, log_every=4)
    (one, before), (other, after) = settings_texts(run.folder)
    assert (one, other) == (1, 3)
    assert '    log_every = "2 steps"' in before.splitlines()
    assert '    log_every = "4 steps"' in after.splitlines()


@pytest.mark.parametrize("hparams", [True, False])
def test_the_settings_are_hyperparameters_if_hparams_is_set(
    hparams: bool, tiny_run: TinyRun
) -> None:
    run = tiny_run("tensorboard", length=4, settings={"tensorboard": {"hparams": hparams}})
    found = read(run.folder)
    tags = [tag for tag in found.Tags()["tensors"] if tag != "settings"]
    assert tags == (["_hparams_/session_start_info"] if hparams else [])
    if hparams:
        data = HParamsPluginData.FromString(found.SummaryMetadata(tags[0]).plugin_data.content)
        values = data.session_start_info.hparams
        assert values["run.seed"].number_value == run.settings.seed
        assert values["run.device"].string_value == "cpu"
        assert values["tensorboard.hparams"].bool_value is True


@pytest.mark.parametrize("names", [("tensorboard", "grad_stats"), ("grad_stats", "tensorboard")])
def test_histograms_of_other_plugins_are_shown_at_the_steps_of_their_rows(
    names: tuple[str, str], tiny_run: TinyRun
) -> None:
    run = tiny_run(*names, settings=HISTOGRAMS, length=8, log_every=4)
    assert histograms(run.folder) == counted(run.folder, [4, 8])
    assert set(histograms(run.folder)) == {"grad_stats/hidden", "grad_stats/out"}
    assert points(run.folder) == rounded(run.history)


def test_a_resumed_run_has_every_histogram_once(tiny_run: TinyRun) -> None:
    memory = Memory(step=5)
    listed = ["tensorboard", "grad_stats", memory]
    tiny_run(*listed, settings=HISTOGRAMS, length=8, log_every=4)
    run = tiny_run(*listed, settings=HISTOGRAMS, length=12, log_every=4)
    assert histograms(run.folder) == counted(run.folder, [4, 8, 12])


def test_a_rewind_invalidates_the_histograms_of_later_steps(tiny_run: TinyRun) -> None:
    listed = [Memory(step=4, later=7), "tensorboard", "grad_stats"]
    run = tiny_run(*listed, settings=HISTOGRAMS, length=10, log_every=5)
    assert histograms(run.folder) == counted(run.folder, [5, 10])


def test_a_histogram_without_an_open_file_is_ignored() -> None:
    Tensorboard().on_histogram("some/name", 1, [0.0, 1.0], [3])


def test_values_that_are_no_number_or_too_large_for_32_bits_are_no_error(tiny_run: TinyRun) -> None:
    @plugin
    class Odd:
        @hookimpl
        def on_step_end(self, run: Run) -> None:
            for name, value in {"nan": math.nan, "inf": -math.inf, "huge": 1e300}.items():
                run.log(f"odd/{name}", value)

    found = points(tiny_run(Tensorboard(), Odd(), length=1).folder)
    assert math.isnan(found["odd/nan"][0][1])
    assert [found["odd/inf"], found["odd/huge"]] == [[(1, -math.inf)], [(1, math.inf)]]
