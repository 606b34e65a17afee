"""Norms and ratios equal those of handwritten PyTorch exactly; no number is read in a step."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from python_calls import CallsBetween
from torch import Tensor, nn

from fundamentallm import Rejection, Run, SettingsError, hookimpl, plugin
from fundamentallm.testing import HostReads, Memory, PluginContract, TinyRun, assert_same_weights
from fundamentallm_grad_stats import GradStats
from fundamentallm_grad_stats.groups import group_of, grouped, matched, merged
from fundamentallm_grad_stats.norms import EDGES, histogram, norm


class TestContract(PluginContract):
    plugin = GradStats
    needs = {"every": 1, "histograms": True}
    wrong_settings = (
        ({"every": 0}, "grad_stats.every: must be >= 1"),
        ({"per": "layer"}, 'grad_stats.per: unknown value "layer"'),
        ({"max_keys": 2}, "grad_stats.max_keys: must be >= 3"),
        ({"groups": {"All": "*"}}, "grad_stats.groups: 'All' is no lower-case name"),
        ({"groups": {"rest": "*"}}, "grad_stats.groups: 'rest' is no lower-case name, or is taken"),
        (
            {"groups": {"a": "*"}, "max_keys": 5},
            "grad_stats.max_keys: these groups and the rest make 6",
        ),
        ({"groups": {"a": 1}}, "grad_stats.groups.a: expected a string"),
    )


@plugin
class Witness:
    """Keeps weights before, weights after and gradients of every step, by name."""

    def __attrs_post_init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.grads: list[dict[str, Tensor]] = []

    @hookimpl
    def on_step_start(self, run: Run) -> None:
        self.before.append({n: p.detach().clone() for n, p in run.model.named_parameters()})

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        parameters = dict(run.model.named_parameters())
        self.after.append({n: p.detach().clone() for n, p in parameters.items()})
        self.grads.append({n: p.grad.clone() for n, p in parameters.items() if p.grad is not None})


def by_torch(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def expected(witness: Witness, step: int, groups: dict[str, list[str]]) -> dict[str, float]:
    found = {}
    for group, names in groups.items():
        before, after, grads = (
            [kept[step - 1][n] for n in names]
            for kept in (witness.before, witness.after, witness.grads)
        )
        change = [new - old for new, old in zip(after, before, strict=True)]
        found[f"grad_norm/{group}"] = by_torch(grads).item()
        found[f"weight_norm/{group}"] = by_torch(after).item()
        found[f"update_ratio/{group}"] = (by_torch(change) / by_torch(before)).item()
    return found


def measured(row: dict[str, float]) -> dict[str, float]:
    sections = ("grad_norm/", "weight_norm/", "update_ratio/")
    return {name: row[name] for name in row if name.startswith(sections)}


HIDDEN, OUT = ["hidden.weight", "hidden.bias"], ["out.weight", "out.bias"]
BY_BLOCK = {"hidden": HIDDEN, "out": OUT}


@pytest.mark.parametrize(
    ("table", "groups"),
    [
        ({}, BY_BLOCK),
        ({"per": "module"}, BY_BLOCK),
        ({"per": "parameter"}, {name: [name] for name in HIDDEN + OUT}),
        (
            {"groups": {"matrices": "*.weight"}},
            {"matrices": [HIDDEN[0], OUT[0]], "rest": [HIDDEN[1], OUT[1]]},
        ),
        ({"max_keys": 3}, {"hidden..out": HIDDEN + OUT}),
        (
            {"per": "parameter", "max_keys": 8},
            {"hidden.weight..hidden.bias": HIDDEN, "out.weight..out.bias": OUT},
        ),
    ],
)
def test_all_metrics_equal_handwritten_ones_bit_by_bit(tiny_run: TinyRun, table, groups):
    witness = Witness()
    settings = {"grad_stats": {"every": 1, **table}}
    run = tiny_run(witness, "grad_stats", length=4, log_every=1, settings=settings)
    for step, row in enumerate(run.history, 1):
        assert measured(row) == expected(witness, step, groups)


def test_gradients_are_measured_as_they_were_applied_after_clipping(tiny_run: TinyRun):
    settings = {"grad_clip": {"max_norm": 0.01}, "grad_stats": {"every": 1}}
    for listed in (["grad_clip", "grad_stats"], ["grad_stats", "grad_clip"]):
        run = tiny_run(*listed, length=2, log_every=1, settings=settings)
        for row in run.history:
            clipped = math.hypot(row["grad_norm/hidden"], row["grad_norm/out"])
            assert math.isclose(clipped, 0.01, rel_tol=1e-3)
            assert row["optim/grad_norm"] > 0.1


def test_measures_in_the_steps_that_are_due_and_logs_their_mean(tiny_run: TinyRun):
    witness = Witness()
    run = tiny_run(witness, GradStats(every=3), length=12, log_every=6)
    assert [row["step"] for row in run.history] == [6, 12]
    for row, (one, other) in zip(run.history, ((3, 6), (9, 12)), strict=True):
        pairs = [expected(witness, step, BY_BLOCK) for step in (one, other)]
        assert measured(row) == {name: math.fsum(p[name] for p in pairs) / 2 for name in pairs[0]}


@pytest.mark.parametrize(("log_every", "length", "rows"), [(4, 8, [4, 8]), ("8 tokens", 52, [50])])
def test_measures_by_default_once_in_a_log_period_of_steps_else_every_50_steps(
    tiny_run: TinyRun, log_every, length, rows
):
    run = tiny_run(GradStats(), length=length, log_every=log_every)
    assert [row["step"] for row in run.history if measured(row)] == rows


def test_a_rejected_step_is_not_measured(tiny_run: TinyRun):
    @plugin
    class Picky:
        """Rejects every other step."""

        @hookimpl
        def judge_step(self, run: Run):
            return Rejection("other", "picky") if run.progress.step % 2 else None

    witness = Witness()
    run = tiny_run(witness, Picky(), GradStats(every=1, histograms=True), length=6, log_every=1)
    for step, row in enumerate(run.history, 1):
        assert measured(row) == ({} if step % 2 == 0 else expected(witness, step, BY_BLOCK))
    assert [line["step"] for line in read(run)] == [1, 3, 5]


def test_frozen_parameters_are_not_measured_until_they_are_unfrozen(tiny_run: TinyRun):
    @plugin
    class Thaw:
        """Freezes the first layer for three steps."""

        @hookimpl
        def adapt_model(self, run: Run):
            run.model.hidden.requires_grad_(requires_grad=False)

        @hookimpl
        def on_safe_point(self, run: Run):
            run.model.hidden.requires_grad_(run.progress.step >= 3)

    run = tiny_run(Thaw(), GradStats(every=1, histograms=True), length=5, log_every=1)
    for row, line in zip(run.history, read(run), strict=True):
        thawed = row["step"] > 3
        assert ("grad_norm/hidden" in row) == thawed
        assert ("hidden" in line["counts"]) == thawed
        assert "update_ratio/out" in row


def test_of_a_group_that_is_partly_frozen_the_rest_is_measured(tiny_run: TinyRun):
    @plugin
    class Freeze:
        """Freezes one parameter."""

        @hookimpl
        def adapt_model(self, run: Run):
            run.model.hidden.bias.requires_grad_(requires_grad=False)

    witness = Witness()
    run = tiny_run(Freeze(), witness, GradStats(every=1), length=3, log_every=1)
    for step, row in enumerate(run.history, 1):
        assert measured(row) == expected(witness, step, {"hidden": HIDDEN[:1], "out": OUT})


def test_weights_of_half_precision_are_measured_in_float32():
    tensors = [
        torch.full((1000,), 0.3, dtype=torch.bfloat16),
        torch.full((7,), 2.0, dtype=torch.bfloat16),
    ]
    assert norm(tensors).dtype == torch.float32
    assert norm(tensors).equal(by_torch([t.float() for t in tensors]))
    assert norm([torch.ones(3, dtype=torch.float64)]).dtype == torch.float64


def test_weights_that_are_all_zero_have_an_infinite_ratio_and_nothing_breaks(tiny_run: TinyRun):
    @plugin
    class Zero:
        """Begins with an output layer of zeros."""

        @hookimpl
        def adapt_model(self, run: Run):
            for parameter in run.model.out.parameters():
                nn.init.zeros_(parameter)

    run = tiny_run(Zero(), "jsonl", GradStats(every=1), length=2, log_every=1)
    assert [row["update_ratio/out"] == math.inf for row in run.history] == [True, False]


# --- groups


@pytest.mark.parametrize(
    ("name", "block", "module"),
    [
        ("blocks.3.mlp.up.weight", "blocks.3", "blocks.3.mlp.up"),
        ("model.layers.11.experts.2.W.bias", "model.layers.11", "model.layers.11.experts.2.w"),
        ("embed.weight", "embed", "embed"),
        ("model.norm.weight", "model.norm", "model.norm"),
        ("0.weight", "0", "0"),
        ("scale", "scale", "scale"),
        ("list.0", "list", "list"),
    ],
)
def test_names_are_grouped_by_block_or_module(name: str, block: str, module: str):
    assert group_of(name, "block") == block
    assert group_of(name, "module") == module
    assert group_of(name, "parameter") == name.lower()


NAMES = st.lists(
    st.lists(
        st.sampled_from(["blocks", "0", "1", "2", "mlp", "weight"]), min_size=1, max_size=4
    ).map(".".join),
    min_size=1,
    unique=True,
)


@given(NAMES, st.sampled_from(["block", "module", "parameter"]), st.integers(1, 40))
def test_however_they_are_merged_every_parameter_is_in_one_group_and_there_are_not_too_many(
    names, per, most
):
    found = merged(grouped(names, per), most)
    assert len(found) <= most
    assert sorted(name for group in found.values() for name in group) == sorted(names)


@given(
    NAMES,
    st.dictionaries(st.sampled_from("abc"), st.sampled_from(["*", "blocks.*", "*.weight", "no"])),
)
def test_every_parameter_is_in_the_first_group_that_matches_it(names, patterns):
    found = matched(names, patterns)
    assert sorted(name for group in found.values() for name in group) == sorted(names)
    assert list(found) == [*patterns, "rest"]


def test_a_model_with_many_layers_has_no_more_metrics_than_were_allowed(tiny_run: TinyRun, caplog):
    @plugin
    class Deep:
        """A model of a hundred layers."""

        @hookimpl
        def build_model(self):
            class Layers(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(100))

                def forward(self, inputs, targets):
                    return sum(block(inputs).mean() for block in self.blocks)

            return Layers()

    run = tiny_run(Deep(), GradStats(max_keys=30), length=2)
    names = measured(run.history[0])
    assert len(names) == 30
    assert "grad_norm/blocks.90..blocks.99" in names
    assert caplog.text.count("100 groups would make more than 30 metrics") == 1


# --- histograms


def read(run: Run, name: str = "grad_stats") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / f"{name}.jsonl").read_text().splitlines()]


FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(st.lists(st.lists(FLOATS, min_size=1), min_size=1))
def test_a_histogram_counts_every_value_once_in_its_decade(values):
    tensors = [torch.tensor(each, dtype=torch.float32) for each in values]
    counts = histogram(tensors)
    sizes = [abs(value) for each in tensors for value in each.tolist()]
    edges = [-math.inf, *(torch.tensor(edge).item() for edge in EDGES)]
    by_hand = [sum(low <= size < high for size in sizes) for low, high in pairwise(edges)]
    assert counts.tolist() == [*by_hand, len(sizes) - sum(by_hand)]
    assert counts.dtype == torch.int64


def test_each_measured_step_has_a_line_with_the_counts_of_its_gradients(tiny_run: TinyRun):
    witness = Witness()
    run = tiny_run(witness, GradStats(every=2, histograms=True), length=7, log_every=5)
    assert [line["step"] for line in read(run)] == [2, 4, 6]
    for line in read(run):
        assert line["edges"] == list(EDGES)
        for group, names in BY_BLOCK.items():
            grads = [witness.grads[line["step"] - 1][name] for name in names]
            assert line["counts"][group] == histogram(grads).tolist()
            assert sum(line["counts"][group]) == sum(grad.numel() for grad in grads)


def test_without_histograms_there_is_no_file_and_nothing_to_take(tiny_run: TinyRun):
    takes = Takes()
    assert not (tiny_run(GradStats(every=1), takes).folder / "grad_stats.jsonl").exists()
    assert takes.given == []


@plugin
class Takes:
    """A logger that takes histograms; it may fail to from some moment on."""

    role = "observer"

    most: int = 1000

    def __attrs_post_init__(self) -> None:
        self.given: list[tuple[str, int, list[float], list[int]]] = []
        self.rows: list[int] = []

    @hookimpl
    def on_log(self, run: Run) -> None:
        self.rows.append(run.progress.step)

    @hookimpl
    def on_histogram(
        self, name: str, step: int, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        self.given.append((name, step, list(edges), list(counts)))
        if len(self.given) == self.most:
            raise OSError("the disk is full")


@plugin
class AlsoTakes(Takes):
    """Another one."""


def summed(lines: list[dict[str, Any]], rows: list[int], name: str = "grad_stats") -> list[Any]:
    """What a taker is to be given: for each row the sum of the lines since the last one."""
    found = []
    for last, row in pairwise([0, *rows]):
        counts = [line["counts"] for line in lines if last < line["step"] <= row]
        found += [
            (
                f"{name}/{group}",
                row,
                [float(e) for e in range(-13, 6)],
                [sum(each) for each in zip(*(one[group] for one in counts), strict=True)],
            )
            for group in (counts[0] if counts else ())
        ]
    return found


def test_every_logger_that_takes_histograms_is_given_those_of_each_row_wherever_it_is_listed(
    tiny_run: TinyRun,
):
    one, other = Takes(), AlsoTakes()
    run = tiny_run(one, GradStats(every=2, histograms=True), other, length=11, log_every=4)
    assert one.rows == [4, 8, 11]
    assert one.given == other.given == summed(read(run), one.rows)
    assert [(name, step) for name, step, *_ in one.given] == [
        (f"grad_stats/{group}", step) for step in (4, 8, 11) for group in ("hidden", "out")
    ]
    total = sum(p.numel() for p in run.parameters)
    assert sum(sum(counts) for *_, counts in one.given) == 5 * total


def test_a_row_without_a_measured_step_has_no_histograms(tiny_run: TinyRun):
    takes = Takes()
    tiny_run(takes, GradStats(every=6, histograms=True), length=8, log_every=2)
    assert [step for _, step, *_ in takes.given] == [6, 6]


def test_a_logger_that_fails_at_a_histogram_is_muted_and_nothing_else_changes(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
):
    bad, good = Takes(most=3), AlsoTakes()
    tables = {"grad_stats": {"every": 1, "histograms": True}}
    run = tiny_run(bad, "grad_stats", good, settings=tables, length=6, log_every=1)
    assert run.outcome == "finished"
    assert len(bad.given) == 3
    assert good.given == summed(read(run), good.rows)
    (said,) = [text for text in caplog.messages if "muted" in text]
    assert said.startswith("takes failed and is muted from now on: OSError('the d")


@pytest.mark.parametrize("step", [3, 4, 5])
@pytest.mark.parametrize("closed", [True, False])
def test_a_resumed_run_hands_over_what_the_whole_one_did(
    tiny_run: TinyRun, tmp_path: Path, step: int, closed: bool
):
    memory, whole, resumed = Memory(step=step), Takes(), Takes()
    stats: dict[str, Any] = {"every": 2, "histograms": True}
    tiny_run(memory, GradStats(**stats), whole, length=10, log_every=5)
    assert memory.kept is not None
    if not closed:  # a signal left no time for a row, whether it was due or not
        memory.kept = stopped_at(step, tiny_run, stats, tmp_path)
    tiny_run(memory, GradStats(**stats), resumed, length=10, log_every=5)
    settled = step - (not closed)
    assert resumed.given == [given for given in whole.given if given[1] > settled]
    assert [given[1] for given in whole.given] == [5, 5, 10, 10]


def stopped_at(step: int, tiny_run: TinyRun, stats: dict[str, Any], tmp_path: Path) -> Any:
    """The checkpoint of a run that a signal stopped in a step."""

    @plugin
    class Stop:
        @hookimpl
        def on_step_end(self, run: Run) -> None:
            run.signal = 15 if run.progress.step == step else None

    memory, takes = Memory(step=step), Takes()
    tiny_run(
        memory,
        Stop(),
        GradStats(**stats),
        takes,
        length=10,
        log_every=5,
        run_dir=tmp_path / "stopped",
    )
    assert takes.given == []
    return memory.kept


def test_a_run_that_goes_back_hands_over_the_void_rows_again(tiny_run: TinyRun):
    takes, memory = Takes(), Memory(step=4, later=7)
    listed = [memory, takes, GradStats(every=2, histograms=True)]
    run = tiny_run(*listed, length=8, log_every=5)
    assert [step for _, step, *_ in takes.given] == [5, 5, 5, 5, 8, 8]
    assert takes.given[2:] == summed(read(run), [5, 8])


@pytest.mark.parametrize("stop", [3, 5, 6])
def test_a_run_continued_from_any_checkpoint_has_the_rows_and_lines_of_the_whole(
    tiny_run: TinyRun, tmp_path: Path, stop: int
):
    @plugin
    class Bomb:
        """Fails before a step can be saved, as if the run were killed there."""

        step: int

        @hookimpl
        def on_step_start(self, run: Run):
            if run.progress.step == self.step:
                raise ValueError("on purpose")

    settings = {"checkpoint": {"every": 3}, "grad_stats": {"every": 1, "histograms": True}}
    choice: dict[str, Any] = {"settings": settings, "log_every": 4}
    listed = ["checkpoint", "grad_stats"]
    whole = tiny_run(*listed, length=9, run_dir=tmp_path / "whole", **choice)
    with pytest.raises(Exception, match="on purpose"):
        tiny_run(*listed, Bomb(step=stop), length=9, run_dir=tmp_path / "parts", **choice)
    parts = tiny_run(*listed, length=9, run_dir=tmp_path / "parts", **choice)
    assert_same_weights(whole, parts)
    assert parts.history == whole.history[-len(parts.history) :]
    assert read(parts) == read(whole)


def test_a_rewind_drops_the_lines_of_the_steps_that_are_void(tiny_run: TinyRun):
    @plugin
    class Back:
        """Goes back once, from step 5 to step 3."""

        done: bool = False

        @hookimpl
        def on_step_end(self, run: Run):
            if run.progress.step == 5 and not self.done:
                self.done = True
                run.rewind("latest")

    settings = {"checkpoint": {"every": 3}, "grad_stats": {"every": 1, "histograms": True}}
    run = tiny_run("checkpoint", Back(), "grad_stats", length=8, log_every=2, settings=settings)
    assert [line["step"] for line in read(run)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_line_that_was_cut_short_is_dropped(tiny_run: TinyRun):
    settings = {"checkpoint": {"every": 2}, "grad_stats": {"every": 1, "histograms": True}}
    run = tiny_run("checkpoint", "grad_stats", length=4, settings=settings)
    with (run.folder / "grad_stats.jsonl").open("a") as file:
        file.write('{"step": 4, "ed')
    run = tiny_run("checkpoint", "grad_stats", length=6, settings=settings)
    assert [line["step"] for line in read(run)] == [1, 2, 3, 4, 5, 6]


def test_a_second_instance_has_a_file_of_its_own(tiny_run: TinyRun):
    settings = {
        "grad_stats": {"every": 2, "histograms": True},
        "fine": {"plugin": "grad_stats", "every": 4, "per": "parameter", "histograms": True},
    }
    takes = Takes()
    run = tiny_run("grad_stats", takes, "fine", length=8, log_every=8, settings=settings)
    assert [line["step"] for line in read(run)] == [2, 4, 6, 8]
    assert [line["step"] for line in read(run, "fine")] == [4, 8]
    assert {"grad_norm/hidden", "grad_norm/hidden.bias"} <= measured(run.history[-1]).keys()
    assert {name for name, *_ in takes.given} == {"grad_stats/hidden", "grad_stats/out"} | {
        f"fine/{layer}.{kind}" for layer in ("hidden", "out") for kind in ("weight", "bias")
    }


# --- and nothing else


def test_a_measured_run_ends_in_the_same_bits(tiny_run: TinyRun, tmp_path: Path):
    runs = [
        tiny_run(*listed, length=8, log_every=2, validate_every=2, run_dir=tmp_path / str(n))
        for n, listed in enumerate(([], [GradStats(every=1, histograms=True)]))
    ]
    assert_same_weights(*runs)
    for bare, row in zip(*(run.history for run in runs), strict=True):
        assert bare == {name: row[name] for name in row if name not in measured(row)}


def test_a_measured_step_reads_no_device_value(tiny_run: TinyRun):
    stats = GradStats(every=1, histograms=True)
    run = tiny_run(stats, length=1)
    with HostReads() as reads:
        for parameter in run.parameters:
            parameter.grad = torch.ones_like(parameter)
        stats.on_step_start(run)
        stats.settle_step(run, applied=True)
        assert len(stats.pending) == 1
        assert reads.count == 0
        torch.ones(1).item()
        assert reads.count == 1, "the counter counts"


@pytest.mark.parametrize("histograms", [False, True])
def test_a_step_that_is_not_measured_costs_four_python_calls(
    tiny_run: TinyRun, tmp_path: Path, histograms: bool
):
    counts = []
    stats = GradStats(every=100, histograms=histograms)
    for number, listed in enumerate(([], [stats, *([Takes()] if histograms else [])])):
        between = CallsBetween(first=3, last=6)
        tiny_run(between, *listed, length=7, log_every=100, run_dir=tmp_path / str(number))
        counts.append(between.found)
    assert counts[1] - counts[0] == 3 * 4


def test_a_pattern_that_matches_nothing_ends_the_start_with_what_there_is(tiny_run: TinyRun):
    settings = {"grad_stats": {"groups": {"all": "*", "late": "out.*"}}}
    with pytest.raises(
        SettingsError, match=r"groups\.late: 'out\.\*' matches no remaining parameter"
    ):
        tiny_run("grad_stats", settings=settings)
