"""Frozen parameters keep every bit, for exactly as long as the settings say."""

from __future__ import annotations

import copy
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fundamentallm import (
    Period,
    Progress,
    Rejection,
    Run,
    SettingsError,
    compose,
    hookimpl,
    plugin,
    unmatched,
)
from fundamentallm.testing import (
    PluginContract,
    TinyRun,
    TwoProcesses,
    assert_same_weights,
    weights,
)
from fundamentallm_freeze import Freeze
from fundamentallm_freeze.schedule import freeze


class TestContract(PluginContract):
    plugin = Freeze
    needs = {"patterns": ["hidden.*"], "unfreeze": {"*.bias": 2}}
    wrong_settings = (
        ({}, "freeze.patterns: is missing"),
        ({"patterns": []}, 'freeze.patterns: is empty; name what to freeze, such as ["embed.*"]'),
        ({"patterns": "x.*"}, "freeze.patterns: expected a list"),
        ({"patterns": ["x"], "unfreeze": {"x": 0}}, "freeze.unfreeze.x: a period is finite and"),
        ({"patterns": ["x"], "unfreeze": ["x"]}, "freeze.unfreeze: expected a table"),
    )


class Net(nn.Module):
    """Three blocks with batch norm and dropout, and a layer that shares the first's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2)) for _ in range(3)
        )
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.blocks[0][0].weight
        self.out = nn.Linear(8, 1)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = inputs + block(inputs)
        return nn.functional.mse_loss(self.out(self.tied(inputs)), targets)


@plugin
class Deep:
    """Builds the net."""

    @hookimpl
    def build_model(self) -> nn.Module:
        return Net()


@plugin
class Witness:
    """Records snapshots, serves them as checkpoints, and records which parameters are trained."""

    def __attrs_post_init__(self) -> None:
        self.kept: dict[int, Any] = {}
        self.start: Any = None
        self.trained: list[set[str]] = []
        self.modes: list[dict[str, bool]] = []
        self.rewind: dict[int, str] = {}

    @hookimpl
    def read_checkpoint(self, run: Run) -> Any:
        if run.wanted_checkpoint:
            return copy.deepcopy(self.kept[int(run.wanted_checkpoint.removeprefix("step-"))])
        return copy.deepcopy(self.start)

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self.kept[run.progress.step] = copy.deepcopy(run.snapshot())

    @hookimpl
    def on_step_end(self, run: Run) -> None:
        named = run.model.named_parameters()
        self.trained.append({name for name, p in named if p.grad is not None})
        self.modes.append({name: module.training for name, module in run.model.named_modules()})
        if run.progress.step in self.rewind:
            run.rewind(self.rewind.pop(run.progress.step))

    @hookimpl
    def on_safe_point(self, run: Run) -> None:
        self.kept[run.progress.step] = copy.deepcopy(run.snapshot())


def state(witness: Witness, step: int) -> dict[str, Tensor]:
    return witness.kept[step]["model"]


def test_parameters_that_match_keep_their_bits_and_the_others_are_trained(
    tiny_run: TinyRun,
) -> None:
    seen = Witness()
    tiny_run(Freeze(patterns=["hidden.*"]), seen, length=3)
    before, after = state(seen, 0), state(seen, 3)
    assert all(after[name].equal(before[name]) for name in ("hidden.weight", "hidden.bias"))
    assert not any(after[name].equal(before[name]) for name in ("out.weight", "out.bias"))
    assert seen.trained == [{"out.weight", "out.bias"}] * 3
    assert set(seen.kept[3]["optimizer"]) == {"out.weight", "out.bias"}


def test_a_run_equals_a_handwritten_loop_that_skips_the_frozen_parameters(
    tiny_run: TinyRun,
) -> None:
    seen = Witness()
    plugins = (Deep(), Freeze(patterns=["blocks.*"], unfreeze={"blocks.2.*": Period(2)}), seen)
    run = tiny_run(*plugins, length=5, validate_every=3)
    model = Net()
    model.load_state_dict(state(seen, 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step, batch in zip(range(5), run.data.batches(Progress()), strict=False):
        optimizer.zero_grad()
        run.generators.seed(run.step_seed, step)
        model(*batch.data).backward()
        for name, parameter in model.named_parameters():
            if name.startswith("blocks.") and (step < 2 or not name.startswith("blocks.2.")):
                parameter.grad = None
        optimizer.step()
    expected = model.state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in weights(run).items())


def test_parameters_that_except_for_matches_are_trained(tiny_run: TinyRun) -> None:
    seen = Witness()
    tiny_run(Freeze(patterns=["*"], except_for=["*.bias"]), seen, length=1)
    assert seen.trained == [{"hidden.bias", "out.bias"}]


def test_a_shared_parameter_is_frozen_by_any_of_its_names(tiny_run: TinyRun) -> None:
    run = tiny_run(Deep(), Freeze(patterns=["tied.*"]), length=1)
    assert not run.model.blocks[0][0].weight.requires_grad
    kept = Freeze(patterns=["blocks.*"], except_for=["tied.*"])
    frozen = freeze(Net(), kept, "freeze").until
    assert "blocks.0.0.bias" in frozen
    assert "blocks.0.0.weight" not in frozen


def test_each_part_is_unfrozen_after_exactly_its_period(tiny_run: TinyRun) -> None:
    seen = Witness()
    unfreeze = {"hidden.bias": Period(2), "hidden.*": Period(4), "*.bias": Period(3)}
    tiny_run(Freeze(patterns=["hidden.*"], unfreeze=unfreeze), seen, length=6)
    out = {"out.weight", "out.bias"}
    assert seen.trained == [
        out,
        out,
        out | {"hidden.bias"},
        out | {"hidden.bias"},  # the first of three periods that match it
        out | {"hidden.bias", "hidden.weight"},
        out | {"hidden.bias", "hidden.weight"},
    ]


@pytest.mark.parametrize("unit", ["0.5 epochs", "8 tokens"])
def test_a_period_in_any_unit_can_unfreeze(tiny_run: TinyRun, unit: str) -> None:
    seen = Witness()
    ends = {"hidden.*": Period.parse(unit)}
    tiny_run(Freeze(patterns=["hidden.*"], unfreeze=ends), seen, length=4)
    assert [len(trained) for trained in seen.trained] == [2, 2, 4, 4]


class TestResumedAndRewound:
    SETTINGS = {
        "patterns": ["blocks.*"],
        "unfreeze": {"blocks.2.*": Period(2), "blocks.1.*": Period(4)},
        "eval_mode": True,
    }

    @pytest.fixture
    def whole(self, tiny_run: TinyRun, tmp_path: Path) -> tuple[Run, Witness]:
        seen = Witness()
        return tiny_run(
            Deep(), Freeze(**self.SETTINGS), seen, length=7, run_dir=tmp_path / "whole"
        ), seen

    @pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
    def test_resuming_anywhere_ends_with_the_same_bits(
        self, tiny_run: TinyRun, whole: tuple[Run, Witness], step: int
    ) -> None:
        seen = Witness()
        seen.start = whole[1].kept[step]
        resumed = tiny_run(Deep(), Freeze(**self.SETTINGS), seen, length=7)
        assert_same_weights(resumed, whole[0])
        assert seen.trained == whole[1].trained[step:]
        assert seen.modes == whole[1].modes[step:]

    @pytest.mark.parametrize(("at", "to"), [(5, 1), (5, 3), (3, 0), (6, 5)])
    def test_a_rewind_freezes_again_what_was_frozen_at_that_step(
        self, tiny_run: TinyRun, whole: tuple[Run, Witness], at: int, to: int
    ) -> None:
        seen = Witness()
        seen.rewind = {at: f"step-{to:08d}"}
        tiny_run(Deep(), Freeze(**self.SETTINGS), seen, length=7)
        assert seen.trained == whole[1].trained[:at] + whole[1].trained[to:]
        assert seen.modes == whole[1].modes[:at] + whole[1].modes[to:]

    @pytest.mark.parametrize("places", list(itertools.permutations(range(3))))
    def test_any_order_of_the_list_ends_with_the_same_bits(
        self, tiny_run: TinyRun, whole: tuple[Run, Witness], places: tuple[int, ...]
    ) -> None:
        parts = [Deep(), Freeze(**self.SETTINGS), Witness()]
        assert_same_weights(tiny_run(*(parts[i] for i in places), length=7), whole[0])


@plugin
class Reject:
    """Rejects the first two steps."""

    @hookimpl
    def judge_step(self, run: Run) -> Rejection | None:
        return Rejection("other", "no") if run.progress.step < 2 else None


def test_an_unfreeze_period_counts_attempted_steps(tiny_run: TinyRun) -> None:
    seen = Witness()
    tiny_run(Freeze(patterns=["hidden.*"], unfreeze={"*": Period(3)}), Reject(), seen, length=4)
    assert [len(trained) for trained in seen.trained] == [2, 2, 2, 4]


def test_completely_frozen_modules_stay_in_evaluation_mode_until_they_are_unfrozen(
    tiny_run: TinyRun,
) -> None:
    seen = Witness()
    frozen = Freeze(patterns=["blocks.*"], eval_mode=True, unfreeze={"blocks.2.*": Period(2)})
    run = tiny_run(Deep(), frozen, seen, length=3, validate_every=1)
    training = [{n for n, on in modes.items() if on and n.count(".") == 2} for modes in seen.modes]
    assert training == [set(), set(), {"blocks.2.0", "blocks.2.1", "blocks.2.2"}]
    assert all(modes[""] and modes["out"] for modes in seen.modes)
    before, after = state(seen, 0), weights(run)
    moved = {n for n in after if "running_mean" in n and not after[n].equal(before[n])}
    assert moved == {"blocks.2.1.running_mean"}


def test_without_eval_mode_frozen_modules_are_in_training_mode(tiny_run: TinyRun) -> None:
    seen = Witness()
    tiny_run(Deep(), Freeze(patterns=["blocks.*"]), seen, length=1, validate_every=1)
    assert all(seen.modes[0].values())


def test_parameters_that_another_plugin_froze_are_never_unfrozen() -> None:
    net = Net()
    for parameter in net.blocks[1].parameters():
        parameter.requires_grad = False
    schedule = freeze(
        net, Freeze(patterns=["blocks.*"], unfreeze={"blocks.*": Period(1)}), "freeze"
    )
    run = Run.__new__(Run)
    run.model, run.progress = net, Progress(step=1)
    assert schedule.apply(run) == []
    left = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert {name.split(".")[1] for name in left} == {"1"}


def test_the_log_states_how_many_weights_are_frozen(
    tiny_run: TinyRun, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="fundamentallm")
    tiny_run(Freeze(patterns=["hidden.*"], unfreeze={"*.bias": Period(2)}), length=4)
    lines = [text for text in caplog.messages if text.startswith("freeze: ")]
    assert lines == [
        "freeze: from step 1 on, 144 of 161 weights are frozen",
        "freeze: from step 3 on, 128 of 161 weights are frozen",
    ]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"patterns": ["hiden.*"]},
            "freeze.patterns: 'hiden.*' matches no parameter (did you mean 'hidden.*'?)",
        ),
        (
            {"patterns": ["q"]},
            "freeze.patterns: 'q' matches no parameter (known: hidden.*, hidden.weight, hidden.bias",
        ),
        (
            {"patterns": ["hidden.*"], "except_for": ["out.wait"]},
            "freeze.except_for: 'out.wait' matches no parameter (did you mean 'out.weight'?)",
        ),
        (
            {"patterns": ["hidden.*"], "unfreeze": {"out.*": Period(1)}},
            "freeze.unfreeze: 'out.*' matches no frozen parameter",
        ),
        ({"patterns": ["*"]}, "freeze.patterns: nothing is left to train; exclude some"),
        ({"patterns": ["*"], "unfreeze": {"*": Period(1)}}, "nothing is left to train"),
    ],
)
def test_patterns_that_do_not_fit_the_model_are_reported_with_ones_that_do(
    tiny_run: TinyRun, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        tiny_run(Freeze(**settings), length=1)
    assert complaint in str(caught.value)


def test_all_patterns_that_match_nothing_are_reported_at_once(tiny_run: TinyRun) -> None:
    with pytest.raises(SettingsError) as caught:
        tiny_run(Freeze(patterns=["a.*", "hidden.*", "b.*"], except_for=["c"]), length=1)
    assert len(caught.value.problems) == 3


@plugin
class Picky:
    """An optimizer of what is trainable at the start."""

    @hookimpl
    def build_optimizer(self, run: Run) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in run.model.parameters() if p.requires_grad], lr=0.1)


def test_an_optimizer_built_without_the_unfrozen_parameters_is_refused(tiny_run: TinyRun) -> None:
    tiny_run(Freeze(patterns=["hidden.*"]), Picky(), length=1)
    with pytest.raises(SettingsError, match=r"the optimizer was built without 'hidden\.weight'"):
        tiny_run(Freeze(patterns=["hidden.*"], unfreeze={"*": Period(9)}), Picky(), length=1)


def test_unfrozen_in_several_processes_is_refused(two_processes: TwoProcesses) -> None:
    unfreezes = Freeze(patterns=["hidden.*"], unfreeze={"*": Period(9)})
    for rank, one in enumerate(two_processes(unfreezes, length=1)):
        assert isinstance(one.error, SettingsError)
        assert "freeze.unfreeze: works with one process only; with 2" in str(one.error)
        assert one.error.printed_elsewhere is (rank > 0)


def test_a_second_instance_is_refused(tmp_path: Path) -> None:
    table = {"patterns": ["hidden.*"]}
    tables = {
        "plugins": ["freeze", "more"],
        "run": {"length": 1},
        "freeze": table,
        "more": {"plugin": "freeze", **table},
    }
    with pytest.raises(SettingsError, match=r"freeze .* and more .* edit the same thing"):
        compose(tables)


def test_the_optimizers_plugin_trains_parameters_once_they_are_unfrozen(tiny_run: TinyRun) -> None:
    seen = Witness()
    frozen = Freeze(patterns=["hidden.*"], unfreeze={"hidden.*": Period(2)})
    tiny_run("adamw", frozen, seen, length=4)
    assert [len(trained) for trained in seen.trained] == [2, 2, 4, 4]
    for step, same in ((2, True), (4, False)):
        found, before = state(seen, step)["hidden.weight"], state(seen, 0)["hidden.weight"]
        assert found.equal(before) is same
    assert len(seen.kept[2]["optimizer"]) == 2
    assert len(seen.kept[4]["optimizer"]) == 4


NAMES = [name for name, _ in Net().named_parameters(remove_duplicate=False)]


@given(st.text(max_size=8))
def test_a_pattern_is_reported_exactly_if_it_matches_nothing(glob: str) -> None:
    net = Net()
    complaints = list(unmatched("freeze.patterns", [glob], NAMES))
    try:
        until = freeze(net, Freeze(patterns=[glob]), "freeze").until
    except SettingsError as error:
        assert complaints == error.problems or "nothing is left" in str(error)
    else:
        assert until
        assert not complaints
